"""Translate pages in Quarto's dialect, as nbdev leaves them, to MyST. Labels belong to their page, as in Quarto."""
import ast
import re
import struct
from base64 import b64decode
from functools import partial
from itertools import groupby
from posixpath import dirname, join, normpath, relpath
from textwrap import wrap

import nbformat
import yaml
from fastcore.basics import listify
from nbdev.doclinks import patch_name
from source import DEFINITIONS, anchor, definition, docment_table, docments, signature

SHELL = re.compile(r'^```sh$.*?^```$', re.M|re.S)
SHORT_CELL = re.compile(r'(?<=<td>)[^<]{1,24}(?=</td>)') # of a table: an interval stays on one line, where sentences wrap
FENCED = re.compile(r'^ *(`{3,}|~{3,}).*?^ *\1 *$', re.M|re.S)
INLINE = re.compile(r'(`+)(?!`).+?(?<!`)\1(?!`)', re.S)
DIRECTIVE = re.compile(r'#\|\s*([\w-]+):?\s*(.*)')
PAGE_LINK = re.compile(r'\(((?:[\w.-]+/)*\w+\.(?:ipynb|qmd))(#[\w-]+)?\)')
HEADING = re.compile(r'^(#+) ([\w.]+)[ \t]*$', re.M)

def key(
    page:str, # its name, as `core/nodes`
)->str:
    "What the labels of a page begin with."
    return page.replace('/', '.')

def outside(
    code, # pattern of what is left alone
    change, # function of text
    text:str,
)->str:
    "Change the text between matches of `code`."
    parts, end = [], 0
    for m in code.finditer(text):
        parts, end = [*parts, change(text[end:m.start()]), m[0]], m.end()
    return ''.join([*parts, change(text[end:])])

# Symbols

def page_symbols(
    nb, # a processed notebook
)->list[str]: # as `show_doc` names them
    "The symbols that a page documents."
    return [HEADING.search(show_doc(c))[2] for c in nb.cells if show_doc(c)]

def symbol_labels(
    pages:dict, # page name to processed notebook
)->dict: # (page, symbol) to label
    "A label for every documented symbol; labels ignore case, so a second one gets a number."
    labels = {}
    for page,nb in pages.items():
        for symbol in page_symbols(nb):
            same = sum(p==page and s.lower()==symbol.lower() for p,s in labels)
            labels.setdefault((page,symbol), f'{key(page)}.{symbol}'.lower()+(f'-{same}' if same else ''))
    return labels

def symbol_link(
    m, # match of text, page and anchor
    labels:dict, # of `symbol_labels`
)->str:
    "A link of nbdev's to this site: to the symbol of exactly this name, else of its class; private names have none."
    text, page, anchor = m[1], m[2], m[3].lower()
    if anchor.split('.')[-1].startswith('_'): return text
    name = text.strip('`').removesuffix('()')
    for wanted in (anchor, anchor.rpartition('.')[0]):
        found = {s: l for (p,s),l in labels.items() if p==page and s.lower()==wanted}
        if found: return f'[{text}](#{found.get(name) or next(iter(found.values()))})'
    return f'[{text}](#{key(page)}.{anchor})'

# Markdown

def callout(m)->str:
    "A callout as an admonition."
    fence, kind, title = m[1], m[2], re.search(r'title="([^"]*)"', m[3])
    if not title: return f'{fence}{{{kind}}}'
    return f'{fence}{{admonition}} {title[1]}\n:class: {kind}' + (' dropdown' if 'collapse="true"' in m[3] else '')

def table(m, page:str)->str:
    "A table with a caption."
    name = f':name: {page}.{m[3]}\n' if m[3] else ''
    return f':::{{table}} {m[2]}\n{name}\n{m[1]}:::'

def figure(m, page:str)->str:
    "An image with a caption and a label; the caption is the text for those who do not see it, unless there is another."
    alt = re.search(r'fig-alt="([^"]*)"', m[4])
    return f':::{{figure}} {m[2]}\n:name: {page}.{m[3]}\n:alt: {alt[1] if alt else m[1]}\n\n{m[1]}\n:::'

def references(text:str, page:str)->str:
    "References to equations, figures, tables and sections, and citations."
    text = re.sub(r'(?<![\w@\[])@eq-([\w-]+)', rf'{{eq}}`{page}.eq-\1`', text)
    text = re.sub(r'(?<![\w@\[])@(fig|tbl)-([\w-]+)', rf'{{numref}}`{page}.\1-\2`', text)
    text = re.sub(r'(?<![\w@\[])@sec-([\w-]+)', rf'{{ref}}`{page}.sec-\1`', text)
    return re.sub(r'\[@([\w:-]+)\]', rf'{{cite:p}}`{page}-\1`', text)

def page_link(
    m, # match of a file, relative to the page's, and perhaps of a label there
    page:str,
    files:dict, # file name to page name
)->str:
    "A link to another page, or to a label on it; what is no page stays, and Sphinx complains."
    to = files.get(normpath(join(dirname(page), m[1])))
    if not to: return m[0]
    return f'(#{key(to)}.{m[2][1:]})' if m[2] else f'(project:{relpath(to, dirname(page) or ".")}.ipynb)'

def prose(text:str, page:str, site:str, files:dict, labels:dict)->str:
    "Translate Markdown without fenced code."
    text = PAGE_LINK.sub(partial(page_link, page=page, files=files), text)
    page = key(page)
    text = re.sub(r'\$\$\s*\{#(eq-[\w-]+)\}', rf'$$ ({page}.\1)', text)
    text = re.sub(r'^(:{3,})\s*\{\.callout-(\w+)([^}]*)\}[^\S\n]*$', callout, text, flags=re.M)
    text = re.sub(r'^(#+ .*?)\s*\{#([\w-]+)[^}]*\}[^\S\n]*$', rf'({page}.\2)=\n\1', text, flags=re.M)
    text = re.sub(r'((?:^\|.*\n)+)\n: (.*?)(?: \{#([\w-]+)\})?$', partial(table, page=page), text, flags=re.M)
    text = re.sub(r'^!\[([^\]]*)\]\(([^)]*)\)\{#([\w-]+)([^}]*)\}$', partial(figure, page=page), text, flags=re.M)
    text = re.sub(r'\[\[(`[^`]+`)\]\([^)]*\)\](?=\()', r'[\1]', text) # a symbol that is a link already
    text = re.sub(r'^(#+ )\[(`[^`]+`)\]\([^)]*\)', r'\1\2', text, flags=re.M) # a heading is no link
    text = re.sub(rf'\[(`[^`]+`)\]\({re.escape(site)}/([\w/-]+)\.html#([\w.]+)\)', partial(symbol_link, labels=labels), text)
    text = re.sub(r'\]\(#((?:eq|fig|sec|tbl)-[\w-]+)\)', rf'](#{page}.\1)', text)
    return outside(INLINE, partial(references, page=page), text)

def fold_shell(
    m, # match of a fenced block of shell lines
)->str:
    "Lines longer than a page is wide go on after a backslash, so that no option is cut in two; comments and quotes stay as they are."
    def fold(line): return line if '#' in line or '"' in line else ' \\\n    '.join(wrap(line, 92, break_long_words=False, break_on_hyphens=False))
    return '\n'.join(fold(o) if len(o)>96 else o for o in m[0].splitlines())

# Cells

def directives(
    cell, # a code cell
)->dict: # key to value
    "Take the leading `#| key: value` lines off a cell."
    lines, found = cell.source.splitlines(), {}
    while lines and (m := DIRECTIVE.match(lines[0])):
        found[m[1]] = yaml.safe_load(m[2]) if m[2] else True
        lines.pop(0)
    cell.source = '\n'.join(lines)
    return found

def show_doc(cell)->str: # Markdown, or nothing
    "What `show_doc` says in this cell."
    if cell.cell_type!='code' or not re.search(r'^show_doc\(', cell.source, re.M): return ''
    return ''.join(o.data['text/markdown'] for o in cell.outputs if 'text/markdown' in o.get('data', {}))

def source_order(
    cells, # of a processed notebook
)->list:
    "nbdev turns the order around where one cell defines several symbols: here it is that of the source."
    line = lambda c: int(re.search(r'#L(\d+)\)', show_doc(c))[1])
    runs = [(documents, list(run)) for documents,run in groupby(cells, lambda c: bool(show_doc(c)))]
    return [c for documents,run in runs for c in (sorted(run, key=line) if documents else run)]

def symbol_cell(text:str, page:str, labels:dict, translate, level:int, modules:dict):
    "`show_doc` as a section that has the symbol's label; nbdev's signature has no `*` and long names, so the source's takes its place."
    symbol = HEADING.search(text)[2]
    path, line = re.search(r'.*/fisher_nodes/([\w/]+)\.py#L(\d+)\)', text).groups()
    module, line = key(path), int(line)
    source = modules[module]
    o = definition(source, line)
    said = text[HEADING.search(text).end():].strip()
    said = FENCED.sub('', said, count=1).strip()
    parts = [f'({labels[page,symbol]})=', f'{"#"*level} {symbol}', f'```python\n{signature(o, source)}\n```',
             f'{said} [source](#{anchor(module, source, line)}){{.source}}', docment_table(docments(o, source))]
    return nbformat.v4.new_markdown_cell(translate('\n\n'.join(o for o in parts if o).replace(')=\n\n', ')=\n', 1)))

def shown_symbols(cell)->list[str]:
    "The symbols whose source a cell shows: nbdev marks what was flagged `exports`."
    if cell.cell_type!='code' or '#| code-summary: "Exported source"' not in cell.source: return []
    return [name for o in ast.parse(cell.source).body if isinstance(o, DEFINITIONS) for name in listify(patch_name(o))]

def source_heading(
    symbols:list, # of `shown_symbols`
    page:str,
    labels:dict, # of `symbol_labels`
    level:int,
)->list: # one cell or none
    "The heading above source that is shown: its public symbols, each with its label. The source says the rest."
    public = [o for o in symbols if (page,o) in labels]
    marks = [f'({labels[page,o]})=' for o in public]
    return [nbformat.v4.new_markdown_cell('\n'.join([*marks, f'{"#"*level} {", ".join(public)}']))] if public else []

def is_wide(
    outputs, # of a cell
)->bool:
    "Whether a picture is so wide that a phone had better scroll it than shrink it."
    sizes = [struct.unpack('>II', b64decode(o['data']['image/png'])[16:24]) for o in outputs if 'image/png' in o.get('data', {})]
    return any(w>2.6*h or w>1400 for w,h in sizes)

def code_cell(cell, page:str, translate, of_page:dict):
    "A code cell with its directives, and those of its page, as MyST-NB's tags; without outputs that need a script of somebody else."
    found = of_page | directives(cell)
    tags = dict(echo='remove-input', include='remove-cell', output='remove-output')
    cell.metadata = dict(tags=[t for k,t in tags.items() if found.get(k) is False], mystnb={})
    if found.get('code-fold') is True and 'remove-input' not in cell.metadata['tags']: cell.metadata['tags'].append('hide-input')
    alt, caption = found.get('fig-alt'), found.get('fig-cap')
    if alt or caption: cell.metadata['mystnb']['image'] = dict(alt=alt or caption) | (dict(classes='wide') if is_wide(cell.outputs) else {})
    name = dict(name=f'{key(page)}.{found["label"]}') if str(found.get('label', '')).startswith('fig-') else {}
    if caption: cell.metadata['mystnb']['figure'] = dict(caption=translate(caption), **name)
    cell.outputs = [o for o in cell.outputs if 'application/vnd.jupyter.widget-view+json' not in o.get('data', {})]
    for o in cell.outputs:
        if 'text/markdown' in o.get('data', {}): o.data['text/markdown'] = translate(o.data['text/markdown'])
        if 'text/html' in o.get('data', {}): o.data['text/html'] = SHORT_CELL.sub(lambda m: m[0].replace(' ', '&nbsp;'), o.data['text/html'])
    return cell

def title_cell(d:dict):
    "Front matter as title and subtitle."
    lines = [f'# {d["title"]}', *([f'*{d["description"]}*'] if d.get('description') else [])]
    return nbformat.v4.new_markdown_cell('\n\n'.join(lines))

def bibliography(page:str):
    "The works that this page cites."
    return nbformat.v4.new_markdown_cell(f'## References\n\n```{{bibliography}}\n:filter: docname in docnames\n:keyprefix: {key(page)}-\n```')

def translate_page(
    nb, # a processed notebook
    page:str, # its name on the site
    site:str, # address of the published site, which nbdev links to
    files:dict, # file name to page name
    labels:dict, # of `symbol_labels`
    modules:dict, # module to its source
):
    "A notebook for MyST-NB."
    markdown = partial(outside, FENCED, partial(prose, page=page, site=site, files=files, labels=labels))
    def translate(text): return markdown(SHELL.sub(fold_shell, text.removesuffix('## Export -')))
    front = yaml.safe_load(nb.cells[0].source.strip().strip('-'))
    cells, level, of_page = [title_cell(front)], 2, {k: front[k] for k in ('code-fold',) if k in front}
    shown = {o for c in nb.cells for o in shown_symbols(c)}
    said_once = [c for c in nb.cells[1:] if not show_doc(c) or HEADING.search(show_doc(c))[2] not in shown]
    for c in source_order(said_once):
        cells += source_heading(shown_symbols(c), page, labels, level)
        if c.cell_type=='markdown' and re.search('^## ', c.source, re.M): level = 3
        if text := show_doc(c): cells.append(symbol_cell(text, page, labels, translate, level, modules))
        elif c.cell_type=='code': cells.append(code_cell(c, page, translate, of_page))
        elif not c.source.startswith('<!--'): cells.append(nbformat.v4.new_markdown_cell(translate(c.source)))
    if any('{cite:p}' in c.source for c in cells): cells.append(bibliography(page))
    return nbformat.v4.new_notebook(cells=cells, metadata=dict(kernelspec=dict(name='python3', display_name='python3', language='python')))

def images_without_text(
    nb, # a processed notebook
)->list[str]: # cell ids
    "The cells with an image that nobody described: no `#| fig-alt:` or `#| fig-cap:`, or nothing between `![` and `]`."
    def bare(c):
        if c.cell_type!='code': return re.search(r'!\[\]\(', FENCED.sub('', c.source))
        images = any(k.startswith('image/') for o in c.outputs for k in o.get('data', {}))
        return images and not re.search(r'^#\|\s*fig-(alt|cap):\s*\S', c.source, re.M)
    return [c.id for c in nb.cells if bare(c)]
