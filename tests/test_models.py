"""What `models` promises: causality, receptive fields, probabilities that sum to one, likelihoods, construction."""

import itertools
import math

import pytest
import torch
from cases_import_placeholder import x
