"""Tests stay offline and write nothing outside the repository, however pytest is started."""

import os

from tools.test_all import environment

for name, value in environment().items():
    os.environ.setdefault(name, value)
