"""Many runs under one budget, and reports with pictures."""

from plait.study.config import Study as Study
from plait.study.match import match_parameters as match_parameters
from plait.study.run import run_study as run_study
from plait.study.table import table as table
