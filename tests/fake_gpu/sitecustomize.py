"""With this folder in PYTHONPATH, every Python process has the fake GPU."""

import fake_cuda

fake_cuda.install()
