"""The page of results is what its command writes from the files."""

from bench import page


def test_the_page_is_what_the_command_writes():
    assert page.PAGE.read_text() == page.page(), "python -m bench.page writes it again"
