"""The words of fastexit.answers.words, for pages."""

from __future__ import annotations

from fastexit.answers.words import at_lines as at_lines
from fastexit.answers.words import between as between
from fastexit.answers.words import clean as clean
from fastexit.answers.words import count as count
from fastexit.answers.words import duration as duration
from fastexit.answers.words import most as most
from fastexit.answers.words import rate as rate
from fastexit.answers.words import share as share
from fastexit.answers.words import short as short
