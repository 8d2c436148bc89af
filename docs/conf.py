"""Sphinx settings for the offline site. `build.py` has translated the pages already."""
from importlib.metadata import files
from pathlib import Path

from nbdev.config import get_config

cfg = get_config()
mathjax = next(o for o in files('sphinx-mathjax-offline') if o.name=='tex-svg-full.js').locate()

project, author, version = cfg.title, cfg.author, cfg.version
copyright = cfg.copyright
extensions = ['myst_nb', 'sphinxcontrib.bibtex', 'sphinx_copybutton']

html_theme, html_title = 'furo', cfg.title
html_static_path, html_css_files = ['nb.css', str(mathjax)], ['nb.css']
html_show_sphinx = html_copy_source = html_show_sourcelink = False
html_show_search_summary = False # it would fetch pages, which file:// forbids
mathjax_path = mathjax.name # one script, no fonts, no network
math_eqref_format, math_numfig = 'Equation {number}', False # numbers begin anew on every page
numfig, numfig_format = True, dict(figure='Figure %s')
copybutton_exclude = '.linenos, .gp, .go'

nb_execution_mode, nb_render_markdown_format = 'off', 'myst'
myst_enable_extensions = ['dollarmath', 'amsmath', 'colon_fence', 'attrs_inline', 'attrs_block']
bibtex_bibfiles = [str(o) for o in Path(cfg.nbs_path).glob('*.bib')]
bibtex_reference_style, bibtex_default_style = 'author_year', 'plain'
suppress_warnings = ['mystnb.mime_priority', 'bibtex.duplicate_label'] # each page numbers its own references
