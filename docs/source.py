"""What the site takes from the project: the order of its pages, signatures as they are written in the source, and the source itself, a page for each module."""
import ast
import io
import re
import tokenize
from pathlib import Path, PurePosixPath

import yaml
from nbdev.doclinks import NbdevLookup

DEFINITIONS = (ast.FunctionDef, ast.ClassDef)
WIDTH = 88 # of a line of a signature
QUARTO = Path(__file__).resolve().parent.parent/'_quarto.yml'

def sidebar(
    items:list|None=None, # of a section; None is all of `_quarto.yml`
    inside:bool=False, # of another section
)->list[tuple]: # caption or None, files below `nbs/`, whether it is folded
    "The sections of the sidebar; a page outside of a section has no caption, a section inside of one is folded."
    if items is None: items = yaml.safe_load(QUARTO.read_text(encoding='utf-8'))['website']['sidebar']['contents']
    found = []
    for o in items:
        if not isinstance(o, dict): found.append((None, [o], False))
        elif any(isinstance(c, dict) for c in o['contents']): found += sidebar(o['contents'], True)
        else: found.append((o['section'], o['contents'], inside))
    return found

def definition(
    text:str, # of a module
    line:int, # the `def` or `class`
):
    "What is defined there."
    return next(o for o in ast.walk(ast.parse(text)) if isinstance(o, DEFINITIONS) and o.lineno==line)

def parameters(
    args:ast.arguments,
    text:str, # of the module
)->list[str]:
    "As they are written, with the marks of what is given by position or by name only; without `self` and `cls`."
    def written(o): return ast.get_source_segment(text, o)
    def one(o, default): return written(o) + (f'={written(default)}' if default else '')
    plain = [*args.posonlyargs, *args.args]
    found = list(map(one, plain, [None]*(len(plain)-len(args.defaults)) + args.defaults))
    if args.posonlyargs: found.insert(len(args.posonlyargs), '/')
    if args.vararg: found.append(f'*{written(args.vararg)}')
    elif args.kwonlyargs: found.append('*')
    found += map(one, args.kwonlyargs, args.kw_defaults)
    if args.kwarg: found.append(f'**{written(args.kwarg)}')
    return found[1:] if plain and plain[0].arg in ('self','cls') else found

def fold(
    head:str, # up to the bracket
    items:list, # what stands in it
    tail:str, # from the other bracket on
)->str:
    "One line, or as few as it takes."
    whole = f'{head}{", ".join(items)}{tail}'
    if len(whole)<=WIDTH: return whole
    lines = ['']
    for o in items:
        if lines[-1] and len(lines[-1])+len(o)>WIDTH-6: lines.append('')
        lines[-1] += f'{o}, '
    return '\n'.join([head, *(f'    {o.rstrip()}' for o in lines), tail])

def def_line(
    o:ast.FunctionDef,
    text:str, # of the module
)->str:
    "A function's decorators, but for `patch`, and its `def`."
    marks = [ast.get_source_segment(text, d) for d in o.decorator_list]
    marks = ['classmethod' if 'cls_method' in d else d for d in marks if d!='patch']
    returns = f'->{ast.get_source_segment(text, o.returns)}' if o.returns else ''
    return '\n'.join([*(f'@{d}' for d in marks), fold(f'def {o.name}(', parameters(o.args, text), f'){returns}')])

def maker(
    o, # a function or class
):
    "What takes the parameters: a class's `__init__` if it has one, else what it is."
    return next((f for f in o.body if isinstance(o, ast.ClassDef) and getattr(f, 'name', '')=='__init__'), o)

def fields(
    o:ast.ClassDef,
)->list[ast.AnnAssign]:
    return [f for f in o.body if isinstance(f, ast.AnnAssign)]

def signature(
    o, # a function or class
    text:str, # of the module
)->str:
    "Decorators and `def`; a class with its `__init__` or its fields."
    if isinstance(o, ast.FunctionDef): return def_line(o, text)
    marks = ''.join(f'@{ast.get_source_segment(text, d)}\n' for d in o.decorator_list)
    bases = ', '.join(ast.get_source_segment(text, b) for b in o.bases)
    parts = [def_line(maker(o), text)] if maker(o) is not o else [ast.get_source_segment(text, f) for f in fields(o)]
    inside = ''.join(f'\n{p}' for p in parts).replace('\n', '\n    ')
    return f'{marks}class {o.name}' + (f'({bases})' if bases else '') + (f':{inside}' if inside else '')

def docments(
    o, # a function or class
    text:str, # of the module
)->dict: # name to docment; `returns` is what comes back
    "What the comments say of fields, or of parameters and the result."
    of = maker(o)
    said = {t.start[0]: t.string.lstrip('# ') for t in tokenize.generate_tokens(io.StringIO(text).readline) if t.type==tokenize.COMMENT}
    if of is o and isinstance(o, ast.ClassDef): last = {f.end_lineno: f.target.id for f in fields(o)}
    else:
        a = of.args
        last = {p.end_lineno: p.arg for p in (*a.posonlyargs, *a.args, a.vararg, *a.kwonlyargs, a.kwarg) if p} # the last on a line is meant
        if of.returns: last |= {of.returns.end_lineno: 'returns'}
    return {name: said[line] for line,name in last.items() if line in said and name not in ('self','cls')}

def docment_table(
    said:dict, # of `docments`
)->str: # Markdown
    "The docments as a table, symbols linked; nothing if there are none."
    link = NbdevLookup().linkify
    rows = [f'| {name if name=="returns" else f"`{name}`"} | {link(what)} |' for name,what in said.items()]
    return '\n'.join(['{.docments}', '| parameter | what it is |', '|---|---|', *rows]) if rows else ''

# Pages

def page_name(
    file:str, # below `nbs/`
)->str:
    "The name that nbdev publishes a file under: its folder, then its name without the number."
    path = PurePosixPath(file)
    return (path.parent/re.sub(r'^\d+[a-zA-Z0-9]*_', '', path.stem.lower())).as_posix()

def chunks(
    text:str, # of a module
)->dict: # first line to text
    "The source, parted where a cell or a definition begins, without nbdev's marks."
    lines = text.splitlines()
    starts = {min([o.lineno, *(d.lineno for d in o.decorator_list)]) for o in ast.parse(text).body if isinstance(o, DEFINITIONS)}
    starts |= {i+2 for i,line in enumerate(lines) if line.startswith('# %% ')} | {1}
    edges = [*sorted(starts), len(lines)+1]
    parts = {a: '\n'.join(o for o in lines[a-1:b-1] if not o.startswith('# %% ')).rstrip() for a,b in zip(edges, edges[1:])}
    return {a: part for a,part in parts.items() if part}

def anchor(
    module:str, # its name, as `core.nodes`
    text:str, # of the module
    line:int,
)->str:
    "The label of the part of the source page where this line is."
    return f'source.{module}.{max(o for o in chunks(text) if o<=line)}'

def source_page(
    module:str, # its name, as `core.nodes`
    text:str, # of the module
)->str: # MyST
    "A page that shows a module, every part with a label."
    page = '../'*module.count('.') + '../' + page_name(re.search(r'edit: \S*?nbs/(\S+?)\.ipynb', text)[1])
    front = f'---\norphan: true\nnosearch: true\n---\n# Source of {module}\n\n[Its page]({page}.ipynb) explains it.\n\n'
    parts = [f'({anchor(module, text, a)})=\n`````{{code-block}} python\n:lineno-start: {a}\n\n{part}\n`````' for a,part in chunks(text).items()]
    return front + '\n\n'.join(parts)
