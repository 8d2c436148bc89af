"""Render the notebooks to `_site/` with Sphinx: no Quarto, no network. `make docs` runs this.

The pages are those that `nbdev_docs` gives to Quarto, in the order of the sidebar in `_quarto.yml`. Every warning fails the build
and leaves `_site/` as it was; it names `_sphinx/pages/PAGE.ipynb:N`, where N is 10,000 times the number of the cell plus the line in it.
"""
import re
import shutil
import sys
from collections import Counter
from pathlib import Path

import nbformat
from quarto import images_without_text, symbol_labels, translate_page
from source import page_name, sidebar, source_page

ROOT = Path(__file__).resolve().parent.parent
WORK, SITE = ROOT/'_sphinx', ROOT/'_site'

def contents(files:dict)->str: # file below `nbs/` to page name
    "Tables of contents, shown in the sidebar only."
    blocks = []
    for caption,listed,_ in sidebar():
        names = [files[o] for o in listed if o in files and o!='index.ipynb']
        head = ':hidden:\n' + (f':caption: {caption}\n' if caption else '')
        if names: blocks.append('\n'.join(['```{toctree}', head, *names, '```']))
    return '\n\n'.join(blocks)

def read_page(path:Path):
    "A processed notebook; a page of text becomes a notebook of two cells."
    text = path.read_text(encoding='utf-8')
    if path.suffix=='.ipynb': return nbformat.v4.reads(text)
    front, text = re.fullmatch(r'---\n(.*?)\n---\n(.*)', text, re.S).groups()
    return nbformat.v4.new_notebook(cells=[nbformat.v4.new_raw_cell(front), nbformat.v4.new_markdown_cell(text)])

def processed_pages(processed:Path)->dict: # file below `nbs/` to its path
    "What nbdev has made pages of; two of one name in a folder would be one page."
    found = {o.relative_to(processed).as_posix(): o for o in sorted(processed.rglob('*')) if o.suffix in ('.ipynb','.qmd')}
    if not found: sys.exit(f'nbdev processed nothing: does the name of a folder above {ROOT} start with a dot?')
    twice = [o for o,n in Counter(map(page_name, found)).items() if n>1]
    if twice: sys.exit(f'more than one file of the name {", ".join(twice)}; the number before a name does not tell pages apart')
    return found

def module_sources()->dict: # module, as `core.nodes`, to its text
    package = ROOT/'fisher_nodes'
    return {'.'.join(o.relative_to(package).with_suffix('').parts): o.read_text(encoding='utf-8') for o in sorted(package.rglob('[!_]*.py'))}

def put(name:str, text:str):
    "Write a page for Sphinx."
    path = WORK/'pages'/name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding='utf-8')

def stage(processed:Path, site:str)->list[str]: # what is wrong
    "Write MyST notebooks to `WORK`."
    paths = processed_pages(processed)
    files = {o: page_name(o) for o in paths}
    pages = {files[o]: read_page(path) for o,path in paths.items()}
    wrong = [f'{name}, cell {c}: an image without `#| fig-alt:`' for name,nb in pages.items() for c in images_without_text(nb)]
    labels, modules = symbol_labels(pages), module_sources()
    shutil.rmtree(WORK, ignore_errors=True)
    shutil.copytree(processed/'images', WORK/'pages'/'images')
    for name,nb in pages.items():
        nb = translate_page(nb, name, site, files, labels, modules)
        if name=='index': nb.cells.append(nbformat.v4.new_markdown_cell(contents(files)))
        put(f'{name}.ipynb', nbformat.writes(nb))
    for name,text in modules.items(): put(f'source/{name.replace(".", "/")}.md', source_page(name, text))
    return wrong

def render()->int: # exit status
    "Sphinx; MyST-NB puts pictures into a folder of its own beside the output."
    from sphinx.cmd.build import main as sphinx
    return sphinx(['-q', '-W', '--keep-going', '-c', str(ROOT/'docs'), '-d', str(WORK/'doctrees'), str(WORK/'pages'), str(WORK/'html')])

def main()->int: # exit status
    from nbdev.config import get_config
    from nbdev.serve import proc_nbs
    cfg = get_config()
    wrong = stage(proc_nbs(n_workers=2, force=True), (cfg.doc_host+cfg.doc_baseurl).rstrip('/'))
    failed = render()
    sys.stderr.writelines(f'{o}\n' for o in wrong)
    if failed or wrong: return 1
    shutil.rmtree(SITE, ignore_errors=True)
    shutil.move(WORK/'html', SITE)
    return 0

if __name__=='__main__': sys.exit(main()) # `proc_nbs` starts processes that import this file
