"""Sphinx settings for the offline site. `build.py` has translated the pages already."""
import re
import sys
from importlib.metadata import files
from pathlib import Path

from nbdev.config import get_config

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))
from source import page_name, sidebar

cfg = get_config()
mathjax = next(o for o in files('sphinx-mathjax-offline') if o.name=='tex-svg-full.js').locate()

project, author, version = cfg.title, cfg.author, cfg.version
copyright = cfg.copyright
extensions = ['myst_nb', 'sphinxcontrib.bibtex', 'sphinx_copybutton']

html_favicon, templates_path = str(HERE.parent/'nbs'/'images'/'favicon.svg'), ['templates']
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
nb_code_prompt_show = nb_code_prompt_hide = 'Code' # where it is folded

# Where a reader goes from a page: the paper, and where the address of the repository is set, to the file itself and to Colab.
PAPER = 'https://arxiv.org/abs/2403.09891'
REPOSITORY = cfg.git_url.rstrip('/') if cfg.d.get('git_url') else ''
SOURCES = {page_name(o): f'nbs/{o}' for _,listed,_ in sidebar() for o in listed}
SOURCES |= {'api': 'nbs/api.qmd.py', 'changelog': 'CHANGELOG.md'}
FOLDED = {caption for caption,_,folded in sidebar() if folded}
SECTION = re.compile(r'<p class="caption" role="heading"><span class="caption-text">([^<]*)</span></p>\n(<ul( class="current")?>.*?</ul>)', re.S)

def page_links(page:str)->list[tuple]: # words and address
    source, links = SOURCES.get(page, ''), [('Paper', PAPER)]
    if REPOSITORY: links.append(('Repository', REPOSITORY))
    if REPOSITORY.startswith('https://github.com/') and source.endswith('.ipynb'):
        place = REPOSITORY.removeprefix('https://github.com/')
        links.append(('Open in Colab', f'https://colab.research.google.com/github/{place}/blob/{cfg.branch}/{source}'))
    return links

def fold(m)->str:
    "A section that is closed unless the page is in it."
    if m[1] not in FOLDED: return m[0]
    return f'<details class="internals"{" open" if m[3] else ""}><summary>{m[1]}</summary>\n{m[2]}</details>'

def add_links(app, page, template, context, doctree):
    context['links'] = page_links(page)
    if REPOSITORY and page in SOURCES: context['theme_source_edit_link'] = f'{REPOSITORY}/edit/{cfg.branch}/{SOURCES[page]}'
    if 'furo_navigation_tree' in context: context['furo_navigation_tree'] = SECTION.sub(fold, context['furo_navigation_tree'])

def setup(app): app.connect('html-page-context', add_links, priority=900) # after the theme
