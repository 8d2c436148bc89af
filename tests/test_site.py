"""The offline site, built from the notebooks and opened in Chromium from file://, at the widths of a desk and of a phone."""
import ast
import json
import re
import subprocess
import sys
from html import unescape
from importlib.util import find_spec
from pathlib import Path

import pytest
from browser import CHROMIUM, NO_CHROMIUM, chromium
from filelock import FileLock

ROOT = Path(__file__).resolve().parent.parent
SITE = ROOT/'_site'
BUILT = SITE/'searchindex.js' # written last
TOOLS = ('sphinx', 'myst_nb', 'furo', 'sphinx_copybutton', 'sphinxcontrib.bibtex', 'playwright', 'nbdev')
DESK, PHONE = dict(width=1280, height=900), dict(width=390, height=844)

def is_there(module):
    try: return find_spec(module) is not None
    except ModuleNotFoundError: return False

needs_tools = pytest.mark.skipif(not all(map(is_there, TOOLS)),
    reason=f'the site needs {", ".join(o for o in TOOLS if not is_there(o))} (Python 3.11 or newer); `make docs` installs them')
needs_browser = pytest.mark.skipif(CHROMIUM is None, reason=NO_CHROMIUM)

def sources():
    patterns = ('nbs/**/*.ipynb', 'nbs/*.*', 'nbs/images/*', 'docs/**/*.*', '_quarto.yml', 'settings.ini', 'CHANGELOG.md', 'fisher_nodes/**/*.py')
    return [o for pattern in patterns for o in ROOT.glob(pattern)]

@pytest.fixture(scope='module')
def site(tmp_path_factory):
    "The built site; what stands there is taken if it is newer than all it is made of."
    with FileLock(tmp_path_factory.getbasetemp().parent/'site.lock'):
        newest = max(o.stat().st_mtime for o in sources())
        if not BUILT.exists() or BUILT.stat().st_mtime<newest:
            done = subprocess.run([sys.executable, ROOT/'docs'/'build.py'], cwd=ROOT, capture_output=True, text=True)
            assert not done.returncode, done.stderr
    return SITE

@pytest.fixture(scope='module')
def browser():
    with chromium() as one: yield one

# What a page may not have, as a function of the page: a list of complaints.
FAULTS = r"""() => {
    const text = document.querySelector('article').cloneNode(true), found = []
    text.querySelectorAll('pre, code, mjx-container, script, style').forEach(o => o.remove())
    for (const raw of [/\$[^$\n]+\$/, /\{#\w+/, /(^|\s)@(eq|fig|sec|tbl)-/, /\[@/, /\]\(/, /^:::/m, /\{(ref|eq|numref|cite)/, /Math input error/])
        if (raw.test(text.textContent)) found.push('not rendered: ' + text.textContent.match(raw)[0])
    for (const o of document.querySelectorAll('article img'))
        if (!o.alt.trim() || o.getAttribute('src').endsWith(o.alt)) found.push('an image without text: ' + o.src)
        else if (!o.naturalWidth) found.push('an image that is not there: ' + o.src)
    for (const o of document.querySelectorAll('.math:not(.highlight *)'))
        if (!o.querySelector('mjx-container')) found.push('no formula: ' + o.textContent)
    for (const o of document.querySelectorAll('article .highlight pre'))
        if (!o.parentElement.querySelector('button.copybtn')) found.push('no copy button: ' + o.textContent.slice(0, 40))
    return found
}"""
# The same at one width: what is cut off, and numbers that lie on their equation.
LAYOUT = r"""() => {
    const wide = [document.documentElement, document.querySelector('.content')].some(o => o.scrollWidth > o.clientWidth + 1)
    const right = o => o.getBoundingClientRect().right > window.innerWidth + 1
    const found = wide ? ['too wide: ' + [...document.querySelectorAll('article *')].filter(right).slice(0, 3).map(o => o.outerHTML.slice(0, 120))] : []
    for (const o of document.querySelectorAll('div.math:has(.eqno)'))
        if (o.querySelector('.eqno').getBoundingClientRect().left < o.querySelector('mjx-container').getBoundingClientRect().right - 1)
            found.push('a number on its equation: ' + o.id)
    return found
}"""

def watch(page):
    "Collect what the page complains about, and what it asks of others."
    seen = []
    page.on('console', lambda o: seen.append(f'console: {o.text}') if o.type in ('error','warning') else None)
    page.on('pageerror', lambda o: seen.append(f'error: {o}'))
    page.on('requestfailed', lambda o: seen.append(f'failed: {o.url}'))
    page.on('request', lambda o: seen.append(f'outside: {o.url}') if not o.url.startswith(('file:','data:')) else None)
    return seen

@pytest.fixture(scope='module')
def page(site, browser):
    return browser.new_page(viewport=DESK)

def open_page(page, path):
    page.set_viewport_size(DESK)
    page.goto(path.as_uri())
    page.wait_for_function('!document.querySelector(".math") || (window.MathJax && MathJax.startup && MathJax.startup.promise)')
    page.evaluate('window.MathJax && MathJax.startup && MathJax.startup.promise.then(() => true)')

@needs_tools
@needs_browser
def test_every_page_in_a_browser(site, page):
    faults, seen = {}, watch(page)
    for path in sorted(site.rglob('*.html')):
        seen.clear()
        open_page(page, path)
        if path.stem not in ('genindex','search'): seen += page.evaluate(FAULTS)
        for size in (DESK, PHONE):
            page.set_viewport_size(size)
            seen += [f'{o} ({size["width"]} px)' for o in page.evaluate(LAYOUT)]
        if seen: faults[path.relative_to(site).as_posix()] = list(seen)
    assert not faults, json.dumps(faults, indent=1, ensure_ascii=False)

@needs_tools
@needs_browser
def test_search_and_copy(site, page):
    seen = watch(page)
    page.goto((site/'search.html').as_uri()+'?q=mask_fisher')
    page.wait_for_selector('#search-results li a')
    found = page.eval_on_selector_all('#search-results li a', 'all => all.map(o => o.getAttribute("href"))')
    assert any(o.startswith('engine/measure.html') for o in found), found
    assert not any(o.startswith('source/') for o in found), found
    open_page(page, site/'core'/'fisher.html')
    page.click('article .highlight', position=dict(x=5, y=5))
    page.click('article .highlight button.copybtn >> nth=0')
    page.wait_for_selector('button.copybtn.success')
    assert seen==[]

@needs_tools
def test_nothing_is_loaded_from_outside(site):
    "What a browser would only ask for later counts too: scripts, styles, pictures, and addresses in styles. Links that a person clicks may lead anywhere."
    loads = re.compile(r'<(?!a\b)[a-z]+\b[^>]*?\b(?:src|srcset|href|data|poster)="((?:https?:)?//[^"]*)"|url\(["\']?(https?://[^)]*)|@import[^;]*(https?://[^;]*)')
    assert loads.search('<link rel="x" href="https://a.org/b.css">') and loads.search('<img alt="" src="//a.org/b.png"/>')
    assert not loads.search('<a class="x" href="https://a.org">')
    files = [o for o in site.rglob('*') if o.suffix in ('.html','.css')]
    assert {(str(o.relative_to(site)), m[0]) for o in files for m in loads.finditer(o.read_text(encoding='utf-8'))}==set()

@needs_tools
def test_where_a_page_leads(site):
    "To the paper, the repository, the notebook itself and Colab; and the internals are closed, but for where the reader is."
    from configparser import ConfigParser
    cfg = ConfigParser()
    cfg.read(ROOT/'settings.ini', encoding='utf-8')
    cfg = cfg['DEFAULT']
    text, place = (site/'core'/'nodes.html').read_text(encoding='utf-8'), f'{cfg["user"]}/{cfg["repo"]}'
    links = dict((words, address) for address,words in re.findall(r'<a href="([^"]*)">([^<]*)</a>', re.search(r'<p class="links">(.*?)</p>', text, re.S)[1]))
    notebook = f'blob/{cfg["branch"]}/nbs/core/01_nodes.ipynb'
    assert links=={'Paper': 'https://arxiv.org/abs/2403.09891', 'Repository': f'https://github.com/{place}',
                   'Open in Colab': f'https://colab.research.google.com/github/{place}/{notebook}'}
    for page,file in {'core/nodes':'nbs/core/01_nodes.ipynb', 'api':'nbs/api.qmd.py', 'changelog':'CHANGELOG.md'}.items():
        found = re.findall(r'href="([^"]*)" rel="edit"', (site/f'{page}.html').read_text(encoding='utf-8'))
        assert found==[f'https://github.com/{place}/edit/{cfg["branch"]}/{file}'] and (ROOT/file).exists()
    assert 'rel="edit"' not in (site/'search.html').read_text(encoding='utf-8')
    assert (site/re.search(r'<link rel="shortcut icon" href="\.\./([^"]*)"', text)[1]).exists()
    closed = [caption for caption,_,folded in sidebar() if folded]
    assert re.findall(r'<details class="internals"( open)?><summary>([^<]*)', text)==[(' open' if o==closed[0] else '', o) for o in closed]
    listed = re.findall(r'class="(?:current )?reference internal" href="(?:\.\./)*([^"]*)\.html"', re.search(r'sidebar-tree">(.*?)</div>', (site/'search.html').read_text(encoding='utf-8'), re.S)[1])
    from source import page_name
    assert listed==[page_name(o) for _,names,_ in sidebar() for o in names if o!='index.ipynb']

@needs_tools
def test_code_of_the_report_is_folded(site):
    for path in (site/'report').glob('*.html'):
        text = path.read_text(encoding='utf-8')
        shown = len(re.findall(r'<div class="cell_input docutils container">', text))
        folded = len(re.findall(r'<details class="admonition hide above-input">', text))
        assert folded and shown==folded, path.name

SIGNATURE = re.compile(r'<h\d>([\w.]+)<a[^>]*>[^<]*</a></h\d>\s*<div class="highlight-python[^>]*>\s*<div[^>]*><pre>(.*?)</pre>.*?href="(?:\.\./)*source/([\w/]+)\.html#', re.S)

def plain(html): return unescape(re.sub(r'<[^>]*>', '', html))

def takes(o):
    "What must be the same in a signature and in the source: parameters with annotations and defaults, or the fields of a class."
    if isinstance(o, ast.ClassDef): o = next((f for f in o.body if getattr(f, 'name', '')=='__init__'), o)
    if isinstance(o, ast.ClassDef): return [ast.dump(f) for f in o.body if isinstance(f, ast.AnnAssign)]
    o.args.args = [a for a in o.args.args if a.arg not in ('self','cls')]
    return ast.dump(o.args), o.returns and ast.dump(o.returns)

def shown(text):
    "The definition that a signature stands for, which is one but for its body."
    try: return ast.parse(text+': ...').body[0]
    except SyntaxError: return ast.parse(text).body[0] # fields

def written(module, name, found={}):
    "The same definition in the package."
    if module not in found: found[module] = ast.parse((ROOT/'fisher_nodes'/f'{module}.py').read_text(encoding='utf-8'))
    *klass, name = name.split('.')
    inside = next((o for o in found[module].body if getattr(o, 'name', '') in klass), None)
    own = [o for o in inside.body if getattr(o, 'name', '')==name] if inside else []
    patched = [o for o in found[module].body if getattr(o, 'name', '')==name and (not klass or klass[0] in ast.unparse(o.args.args[0]))]
    return (own or patched)[0]

@needs_tools
def test_signatures_are_those_of_the_source(site):
    "Nothing is lost on the way to a page: no `*,`, no annotation, no default."
    found = [(plain(name), plain(text).strip(), module) for o in site.rglob('*.html') for name,text,module in SIGNATURE.findall(o.read_text(encoding='utf-8'))]
    assert len(found)>100 and sum('*, ' in text for _,text,_ in found)>10
    assert [(name, text) for name,text,module in found if takes(shown(text))!=takes(written(module, name))]==[]

@needs_tools
def test_api_describes_every_name(site):
    import fisher_nodes
    tables = re.findall(r'<table.*?</table>', (site/'api.html').read_text(encoding='utf-8'), re.S)
    rows = [[[plain(c).strip() for c in re.findall(r'<td>(.*?)</td>', row, re.S)] for row in table.split('<tr')[2:]] for table in tables]
    assert [row for table in rows for row in table if len(row)!=2 or not all(row)]==[]
    assert sorted(name for name,_ in rows[0])==fisher_nodes.__all__

def pages():
    "The files that are pages, as the sidebar names them."
    found = [*ROOT.glob('nbs/**/[!_.]*.ipynb'), *ROOT.glob('nbs/**/*.qmd.py')]
    names = [o.relative_to(ROOT/'nbs').as_posix().removesuffix('.py') for o in found]
    return sorted(o for o in names if not re.search(r'(^|/)[_.]', o))

@needs_tools
def test_every_page_is_on_the_site(site, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT/'docs'))
    from source import page_name
    built = {o.relative_to(site).with_suffix('').as_posix() for o in site.rglob('*.html') if o.relative_to(site).parts[0] not in ('source','_static')}
    assert built-{'genindex','search'}==set(map(page_name, pages()))

@needs_tools
def test_source_that_is_exported_openly_is_shown_once(site, monkeypatch):
    "What `#| exports` flags stands on its page as it was written, under a heading of its symbols, without a second signature."
    monkeypatch.syspath_prepend(str(ROOT/'docs'))
    from source import page_name
    wrong = []
    for name in (o for o in pages() if o.endswith('.ipynb')):
        cells = [''.join(c['source']) for c in json.loads((ROOT/'nbs'/name).read_text(encoding='utf-8'))['cells'] if c['cell_type']=='code']
        text = (site/f'{page_name(name)}.html').read_text(encoding='utf-8')
        blocks = [plain(o).strip() for o in re.findall(r'<pre>(.*?)</pre>', text, re.S)]
        signed = {plain(o) for o,_,_ in SIGNATURE.findall(text)}
        for code in (re.sub(r'^#\|.*\n', '', c, flags=re.M).strip() for c in cells if re.search(r'^#\| *exports', c, re.M)):
            names = {o.name for o in ast.parse(code).body if isinstance(o, (ast.FunctionDef, ast.ClassDef))}
            if blocks.count(code)!=1 or names & signed: wrong.append((name, code[:80]))
    assert wrong==[]

def sidebar():
    "Caption, or None, pages, and whether it is folded."
    sys.path.insert(0, str(ROOT/'docs'))
    pytest.importorskip('nbdev', reason='docs/source.py reads notebooks with nbdev')
    from source import sidebar
    return sidebar()

def test_sidebar_lists_every_page():
    "In `_quarto.yml`, which both renderers read: each once, and none that is not there."
    assert sorted(o for _,listed,_ in sidebar() for o in listed)==pages()

ORDER = [['tutorials'], ['report'], ['app','plugins'], *([o] for o in ('core', 'methods', 'engine', 'merging', 'tasks', 'experiment'))] # folders of the sections

def test_sidebar_is_in_the_order_of_reading():
    "The method on one page, tutorials, report and guides, then the internals, folded, then the reference; in each the pages by number."
    first, sections = [listed for caption,listed,_ in sidebar() if not caption], [o for o in sidebar() if o[0]]
    assert first==[['index.ipynb'], ['00_method.ipynb']]
    assert [sorted({o.partition('/')[0] for o in listed}) for _,listed,_ in sections[:-1]]==ORDER
    assert [listed for _,listed,_ in sections[:-1] if listed!=sorted(listed)]==[]
    assert [folded for *_,folded in sections]==[False]*3+[True]*6+[False]
    assert sections[-1][1]==['api.qmd', 'changelog.qmd']

def test_there_is_one_quarto_file():
    "nbdev reads the one in `nbs/`: a link to the one above it, or a copy where there are no links."
    link, above = ROOT/'nbs'/'_quarto.yml', ROOT/'_quarto.yml'
    assert link.resolve()==above.resolve() or link.read_text(encoding='utf-8') in (above.read_text(encoding='utf-8'), '../_quarto.yml')

# The build: what it must refuse, and what it makes of Quarto's dialect.

BROKEN = {'equation': 'See @eq-none.', 'figure': 'See @fig-none.', 'section': 'See @sec-none.', 'citation': 'See [@none].', 'page': 'See [it](none.ipynb).',
          'symbol': 'See [`none`](https://example.org/fisher.html#none).', 'picture': 'See ![it](images/none.png).'}
GOOD = """## One {#sec-one}

See @eq-one, @sec-one, @tbl-one, [@matena2022merging], [`Place`](https://example.org/deep/toy.html#place), [`place`](https://example.org/deep/toy.html#place),
[`Place.put`](https://example.org/deep/toy.html#place.put) and [`_hidden`](https://example.org/deep/toy.html#_hidden), but not `@eq-one` or `[@none]`.
There is [another page](../00_other.ipynb) and [a part of it](../00_other.ipynb#sec-other).

$$a=b$$ {#eq-one}

| a |
|---|
| 1 |

: A table {#tbl-one}

```
@eq-none
```

```{toctree}
../other
```"""

SOURCE = '''# File to edit: ../../nbs/deep/00_toy.ipynb.
class Place:
    "A Place."

def place(
    a:str|None, # where, see `Place`
    *,
    b:int=0,
    **more,
)->Place: # there
    "A place."
'''

def show_doc(name, line):
    from nbformat.v4 import new_code_cell, new_output
    text = f'---\n\n[source](https://example.org/fisher_nodes/blob/main/fisher_nodes/deep/toy.py#L{line}){{target="_blank"}}\n\n### {name}\n\n```python\ndef {name}(a, b:int)\n```\n\n*A {name}.*'
    return new_code_cell(f'show_doc({name})', outputs=[new_output('execute_result', {'text/markdown': text})])

@pytest.fixture
def sphinx(tmp_path, monkeypatch):
    "A function that translates and builds a toy page in a folder, and returns the page and the complaints."
    monkeypatch.syspath_prepend(str(ROOT/'docs'))
    import nbformat
    from quarto import symbol_labels, translate_page
    from source import source_page
    def build(text):
        front = nbformat.v4.new_raw_cell('---\ntitle: toy\n---')
        nb = nbformat.v4.new_notebook(cells=[front, *map(nbformat.v4.new_markdown_cell, text.split('%%')), show_doc('Place', 2), show_doc('place', 5)])
        for o in ('deep', 'source/deep'): (tmp_path/'src'/o).mkdir(parents=True)
        (tmp_path/'src'/'source'/'deep'/'toy.md').write_text(source_page('deep.toy', SOURCE), encoding='utf-8')
        files = {'deep/00_toy.ipynb':'deep/toy', '00_other.ipynb':'other'}
        page = translate_page(nb, 'deep/toy', 'https://example.org', files, symbol_labels({'deep/toy':nb}), {'deep.toy':SOURCE})
        nbformat.write(page, tmp_path/'src'/'deep'/'toy.ipynb')
        other = nbformat.v4.new_notebook(cells=[front, nbformat.v4.new_markdown_cell('## Other {#sec-other}\n\nText.')])
        nbformat.write(translate_page(other, 'other', 'https://example.org', files, {}, {}), tmp_path/'src'/'other.ipynb')
        done = subprocess.run([sys.executable, '-m', 'sphinx', '-q', '-W', '--keep-going', '-c', ROOT/'docs', '-D', 'root_doc=deep/toy', '-D', 'html_theme=basic',
                               tmp_path/'src', tmp_path/'out'], cwd=ROOT, capture_output=True, text=True)
        return (tmp_path/'out'/'deep'/'toy.html').read_text(encoding='utf-8'), done.stderr
    return build

@needs_tools
def test_build_refuses_what_is_broken(sphinx):
    _, said = sphinx('## One\n\n' + '%%'.join(BROKEN.values()))
    assert {name for i,name in enumerate(BROKEN) if f'toy.ipynb:{i+2}0' not in said}==set(), said

@needs_tools
def test_build_translates_quarto(sphinx):
    page, said = sphinx(GOOD)
    assert not said
    links = dict((text, target) for target,text in re.findall(r'href="#([\w.-]+)"><code[^>]*><span class="pre">([\w.]+)</span></code></a>', page))
    assert links=={'Place':'deep-toy-place', 'place':'deep-toy-place-1', 'Place.put':'deep-toy-place'}
    assert 'def place(a:str|None, *, b:int=0, **more)->Place' in plain(page)
    assert re.findall(r'href="\.\./(source/[^"]*)"', page)==['source/deep/toy.html#source-deep-toy-2', 'source/deep/toy.html#source-deep-toy-5']
    assert re.findall(r'<a class="reference internal" href="\.\./(other[^"]*)"', page)[:2]==['other.html', 'other.html#other-sec-other']
    assert re.findall(r'where, see <.*?>there<', page, re.S)
    for text in ('Equation 1', 'Table 1', 'Matena and Raffel, 2022', '>One</span></a>', '@eq-one', '[@none]', '_hidden'): assert text in unescape(page), text

@needs_tools
def test_an_image_needs_words(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT/'docs'))
    from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output
    from quarto import images_without_text
    picture = [new_output('display_data', {'image/png': ''})]
    cells = [new_markdown_cell('![](a.png)'), new_markdown_cell('![a](a.png)'), new_code_cell('plot()', outputs=picture),
             new_code_cell('#| fig-alt: A plot\nplot()', outputs=picture), new_code_cell('#| fig-cap: A plot\nplot()', outputs=picture)]
    assert images_without_text(new_notebook(cells=cells))==[cells[0].id, cells[2].id]

def test_a_shell_line_goes_on_after_a_backslash(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT/'docs'))
    pytest.importorskip('nbformat', reason='docs/quarto.py reads notebooks with nbformat')
    from quarto import SHELL, fold_shell
    text = '```sh\nshort\n' + 'a-b '*40 + '\n```'
    new = SHELL.sub(fold_shell, text)
    assert new.replace(' \\\n   ', '').split()==text.split() and max(map(len, new.splitlines()))<=96
