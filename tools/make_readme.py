"""Write README.md from nbs/index.ipynb: its prose, its code, and the outputs that are text, tables or nothing."""
import json
import re
from pathlib import Path
from posixpath import normpath

ROOT = Path(__file__).resolve().parent.parent

LINK = re.compile(r'(`+)(?!`).+?(?<!`)\1(?!`)|\]\((?![a-z]+:|#)([^)#\s]+)', re.S) # code, or a link to a file

def moved(text:str)->str:
    "Links to files lead from the root of the project instead of from `nbs/`; code stays as it is."
    return LINK.sub(lambda m: f']({normpath("nbs/"+m[2])}' if m[2] else m[0], text)

def output(o:dict)->str:
    "A stored output as Markdown."
    data = o.get('data', {})
    if 'text/markdown' in data: return ''.join(data['text/markdown'])
    text = ''.join(data.get('text/plain', o.get('text', '')))
    return '\n'.join(f'    {line}' for line in text.rstrip().splitlines())

def cell(c:dict)->list[str]:
    "Blocks of Markdown for one cell."
    source = ''.join(c['source'])
    if c['cell_type']=='markdown': return [moved(source)]
    flags = set(re.findall(r'^#\| *([\w-]+)', source, re.M))
    code = re.sub(r'^#\|.*\n?', '', source, flags=re.M).strip()
    shown = [] if flags & {'hide', 'echo'} or not code else [f'```python\n{code}\n```']
    return [] if 'hide' in flags else [*shown, *(output(o) for o in c['outputs'])]

def readme()->str:
    cells = json.loads((ROOT/'nbs/index.ipynb').read_text(encoding='utf-8'))['cells']
    blocks = [b for c in cells for b in cell(c)]
    return '\n\n'.join(b.strip('\n') for b in blocks if b.strip()) + '\n'

if __name__=='__main__': (ROOT/'README.md').write_text(readme(), encoding='utf-8')
