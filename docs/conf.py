"""Configure Sphinx: the pages of this folder, and an API reference made of docstrings. Warnings are errors."""

from __future__ import annotations

import fastexit

project = "fastexit"
author = "the fastexit authors"
copyright = "2026, the fastexit authors"
release = version = fastexit.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
myst_enable_extensions = ["deflist"]
myst_heading_anchors = 3
napoleon_use_ivar = True
exclude_patterns = ["build", "traces"]

html_theme = "furo"
html_title = f"fastexit {release}"
html_show_sourcelink = False

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_class_signature = "mixed"
python_use_unqualified_type_names = True
autodoc_default_options = {"members": True, "inherited-members": "tuple, int, UserDict", "undoc-members": False}
