"""Mutation testing: change one thing in the package, and see whether a test notices.

    python tests/faults/mutants.py --out _bench/mutants.json [--most 24] [--seed 0] [--only core.averaging]

One pytest session collects the quick tests, and a fork of it notes which lines each of them runs. Then every mutant is
a fork in which a function has other code (or, for what stands outside of functions, in which everything is imported anew
from changed source), and the tests that run its line are tried until one fails. mutmut passes over decorated functions,
and here nearly all are: `@patch`, `@contextmanager`, `@merge_method`. Words are left alone: messages, docstrings, types.
Outcomes are kept in `FILE.jsonl` beside the record; a second run tries only new mutants and survivors without a reason.
A survivor is a missing test, dead code, or has its reason in `EXPLAINED`; the exit status is 0 if all have."""
import argparse, ast, copy, gc, json, os, random, signal, sys, threading, time
from collections import Counter
from importlib.machinery import PathFinder, SourceFileLoader
from pathlib import Path
os.environ.update(OMP_NUM_THREADS='1', HF_HUB_OFFLINE='1', TOKENIZERS_PARALLELISM='false')

import pytest
from _pytest.runner import runtestprotocol

TESTS, ROOT = Path(__file__).resolve().parents[1:3]
PACKAGE = ROOT/'fisher_nodes'
QUICK = ('survivors', 'rules', 'merge', 'nodes', 'masks_fisher', 'grams', 'released', 'fixtures', 'own_method', 'mended', 'parameters',
         'inputs', 'rivals', 'recipe', 'purity', 'saving', 'bad_input', 'streaming', 'roundtrip')
SLOW = 'shell or entry_point or grid or threads or importing or compiled' # tests that start processes
MODULES = 'core/*.py', 'methods/*.py', *(f'engine/{o}.py' for o in ('guard', 'devices', 'classes', 'text')), 'merging/*.py'
OPTIONS = ['-q', '-s', '-o', 'addopts=', '-p', 'no:xdist', '-p', 'no:cacheprovider', f'--rootdir={ROOT}', '-k', f'not ({SLOW})']

ELSEWHERE = '_kernel', 'fused_sums', '_agrees' # tests/kernel runs them, in Triton's interpreter

EXPLAINED = { # how the key of a survivor begins -> why no test can notice
    'core.averaging | shares = products/total.masked_fill(empty, 1) | 1 -> 2': 'these columns are replaced in the next line',
    'core.averaging | key = (kind:=weight_of(scheme, part)), part.kind if kind in BY_NODE else None, layer | part.kind if': 'a finer key of a cache',
    'core.blocks | yield bits if shift==3*_BITS else bits[bits>>shift==prefix] | bits if shift': 'a shortcut: all numbers begin with prefix 0',
    'core.blocks | if shift and counts[i]<=few: return as_float(held(shift).kthvalue(k+1).values) | if': 'a shortcut to the same number',
    'core.fisher | return (torch.tensor(u, device=logits.device, dtype=edges.dtype)[:,None]>edges).sum(1) | torch.tensor(u, device=logits.device, dtype='
    'edges.dtype)[:, None] > edges': 'a draw equals an edge once in 2**53 times',
    'core.nodes | CHUNK = ': 'how much is done at once, not what',
    'methods.dare | keep = torch.rand(vector.shape, generator=draw, dtype=torch.float64)<density | torch.rand(vector.shape, generator=draw, dtype='
    'torch.float64) < density': 'a draw equals a density once in 2**53 times',
    'methods.ties | blocks = [b for n,s in shapes.items() for b in cut(n, s, 4)] | 4 -> ': 'how much is read at once, not what',
    'engine.devices | return (v.pin_memory() if v.is_cpu and device.type==\'cuda\' else v).to(device, non_blocking=True) | True': 'speed, on a GPU',
    'merging.run | if squares is not v or not (low>=0 and high<torch.inf): | if': 'a shortcut: numbers are looked at closely',
    'merging.run | if squares is not v or not (low>=0 and high<torch.inf): | low >= 0 -> low > 0': 'a shortcut: numbers are looked at closely',
    'merging.run | if squares is not v or not (low>=0 and high<torch.inf): | 0 -> 1': 'a shortcut: numbers are looked at closely',
    'merging.merged | split = split_torch_state_dict_into_shards(': 'the pattern is the default of the library',
    'merging.skeletons | return Skeleton(model, Blocks(body)) | return': 'a shortcut; transformers looks instead',
    'merging.skeletons | return found if whole and not old else None | return': 'a shortcut; transformers looks instead',
    "merging.merged | (folder/'README.md').write_text(sign(str(card), '<!-- {} -->'), encoding='utf-8') | (folder / 'README.md').write_text(sign(str(card)"
    ", '<!-- {} -->'), encoding='utf- -> (": 'UTF-8 is what these systems write anyway',
    'merging.merged | def __enter__(self): return self': 'what the block is called is not used',
    'engine.text | def read(t): return [dict(t(*o, truncation=True, max_length=16))': 'how much of the probes is compared, and in which pairs',
    'methods.method | _EXPECTED = ': 'wording: the sentence of pydantic stands in its place',
}

# --- what is changed ------------------------------------------------------------------------------

SWAPS = {ast.Eq: '!=', ast.NotEq: '==', ast.Lt: '<=', ast.LtE: '<', ast.Gt: '>=', ast.GtE: '>', ast.In: 'not in', ast.NotIn: 'in',
         ast.Is: 'is not', ast.IsNot: 'is', ast.Add: '-', ast.Sub: '+', ast.Mult: '/', ast.Div: '*', ast.FloorDiv: '*', ast.Mod: '*',
         ast.LShift: '>>', ast.RShift: '<<', ast.BitAnd: '|', ast.BitOr: '&', ast.And: 'or', ast.Or: 'and'}

def swap(op):
    tree = ast.parse(f'a {SWAPS[type(op)]} b', mode='eval').body
    return tree.ops[0] if isinstance(tree, ast.Compare) else tree.op

def changed(node, **kw):
    new = copy.copy(node)
    vars(new).update(kw)
    return new

def variants(node):
    "What may stand in place of a node."
    is_call = isinstance(node, ast.Expr) and isinstance(node.value, ast.Call)
    match node:
        case ast.Compare() if type(node.ops[0]) in SWAPS: yield changed(node, ops=[swap(node.ops[0]), *node.ops[1:]])
        case ast.BinOp() | ast.BoolOp() | ast.AugAssign() if type(node.op) in SWAPS: yield changed(node, op=swap(node.op))
        case ast.UnaryOp(): yield node.operand
        case ast.Constant(value=bool()): yield changed(node, value=not node.value)
        case ast.Constant(value=int() | float()): yield changed(node, value=node.value+1)
        case ast.If() | ast.IfExp() | ast.While(): yield from (changed(node, test=ast.Constant(o)) for o in (True, False))
        case ast.comprehension() if node.ifs: yield changed(node, ifs=[])
        case _ if is_call or isinstance(node, ast.Raise): yield ast.Pass()
        case ast.Return() if not isinstance(node.value, ast.Constant | None): yield ast.Return(ast.Constant(None))
        case ast.Call(): yield from (changed(node, keywords=[o for o in node.keywords if o is not k]) for k in node.keywords if k.arg)

def nodes(node, around=()):
    "Every node outside of words and types, with those around it."
    yield node, around
    if isinstance(node, (ast.JoinedStr, ast.Raise, ast.arg)) or getattr(node, 'name', '') in ELSEWHERE: return
    for field, o in ast.iter_fields(node):
        if field in ('annotation', 'returns'): continue
        for child in o if isinstance(o, list) else [o]:
            if isinstance(child, ast.AST): yield from nodes(child, (*around, node))

class Put(ast.NodeTransformer):
    def __init__(self, old, new): self.old, self.new = old, new
    def visit(self, node): return ast.copy_location(self.new, node) if node is self.old else self.generic_visit(node)

def text(node): return ' '.join(ast.unparse(ast.fix_missing_locations(node)).split())[:80]

def owner(node, around):
    "The first line of the outermost function whose body a node is in."
    for o in around:
        if isinstance(o, (ast.FunctionDef, ast.Lambda)):
            body = o.body if isinstance(o.body, list) else [o.body]
            return min(o.lineno, *(d.lineno for d in getattr(o, 'decorator_list', ())), o.lineno) if {*around, node} & {*body} else None

def mutants(path):
    "Every mutant of a module: its key, where it is, how to make it."
    name, source, seen = path.relative_to(PACKAGE).with_suffix('').as_posix().replace('/', '.'), path.read_text(), Counter()
    tree, lines = ast.parse(source), source.splitlines()
    for node, around in nodes(tree):
        for new in variants(node):
            line = getattr(node, 'lineno', None) or node.iter.lineno
            key = f'{name} | {lines[line-1].strip()} | {text(node)} -> {text(new)}'
            seen[key] += 1
            yield dict(key=key+f' #{seen[key]}'*(seen[key] > 1), name=name, path=str(path), at=owner(node, around), line=line, tree=tree, put=Put(node, new))

def compiled(m): return compile(ast.fix_missing_locations(m['put'].visit(m['tree'])), m['path'], 'exec')

def sample(args):
    "Some mutants of every module; more of them begin with the same."
    for path in [o for pattern in MODULES for o in sorted(PACKAGE.glob(pattern))]:
        found = [m for m in mutants(path) if m['name'].startswith(args.only)]
        random.Random(f'{args.seed} {path.parent.name}.{path.stem}').shuffle(found)
        yield from found[:args.most]

# --- how it is run --------------------------------------------------------------------------------

def functions(code):
    "The code of what stands outside of functions: in the module, and in its classes."
    for o in code.co_consts:
        if hasattr(o, 'co_code'): yield from [o] if o.co_flags & 2 else functions(o)

def replace_code(m):
    "Put changed code into the function that is loaded; False where it cannot be told which that is."
    new = [o for o in functions(compiled(m)) if o.co_firstlineno == m['at']]
    old = [o for o in gc.get_objects() if type(o).__name__ == 'function' and o.__code__.co_filename == m['path']
           and o.__code__.co_firstlineno == m['at'] and '<locals>' not in o.__code__.co_qualname]
    if len(new) != 1 or len({o.__code__ for o in old}) != 1 or new[0].co_freevars != old[0].__code__.co_freevars: return False
    for o in old: o.__code__ = new[0]
    return True

class Changed(SourceFileLoader):
    "Loads one module from changed code."
    def __init__(self, m):
        super().__init__(f'fisher_nodes.{m["name"]}', m['path'])
        self.code = compiled(m)
    def get_code(self, name): return self.code
    def find_spec(self, name, path=None, target=None):
        if name != self.name: return None
        found = PathFinder.find_spec(name, path)
        found.loader = self
        return found

class Only:
    "Runs some tests, in their order."
    def __init__(self, ids): self.ids = ids
    def pytest_collection_modifyitems(self, items):
        items[:] = sorted((o for o in items if o.nodeid in self.ids), key=lambda o: self.ids.index(o.nodeid))

def run_anew(m, ids):
    "Import everything again, one module changed; whether a test fails."
    for k in list(sys.modules):
        if k.partition('.')[0] in ('fisher_nodes', 'conftest', 'reference') or k.startswith('test_'): del sys.modules[k]
    sys.meta_path.insert(0, Changed(m))
    return pytest.main([*OPTIONS, '-x', *dict.fromkeys(str(ROOT/o.partition('::')[0]) for o in ids)], [Only(ids)]) not in (0, 5)

def reports(items):
    for a, b in zip(items, [*items[1:], None]): yield a, runtestprotocol(a, nextitem=b, log=False)

def run_here(items): return any(o.failed for _, found in reports(items) for o in found)

def forked(job, limit):
    "What a job gives, a small number, in a process of its own; 3 for an error of ours, None if it took too long."
    if not (pid := os.fork()):
        os.setpgid(0, 0)
        for fd in (1, 2): os.dup2(os.open(os.devnull, os.O_WRONLY), fd)
        status = 3
        try: status = int(job())
        finally: os._exit(status)
    end = time.time()+limit
    while time.time() < end:
        if (done := os.waitpid(pid, os.WNOHANG))[0]: return os.waitstatus_to_exitcode(done[1])
        time.sleep(.01)
    os.killpg(pid, signal.SIGKILL)
    os.waitpid(pid, 0)

# --- which tests ----------------------------------------------------------------------------------

class Lines:
    "Which lines of the package are run; a call is the function's first line."
    def __init__(self): self.seen = {}
    def __call__(self, frame, event, arg):
        if not frame.f_code.co_filename.startswith(str(PACKAGE)): return None
        self.seen.setdefault(frame.f_code.co_filename, set()).add(frame.f_lineno)
        return self

def stamp(item):
    "What the notes on a test depend on."
    return max(o.stat().st_mtime for o in [*PACKAGE.rglob('*.py'), TESTS/'reference.py', item.path])

def read_notes(path): return {o['test']: o for o in map(json.loads, path.open())} if path.exists() else {}

def trace(items, path):
    "Note which lines every test runs, and how long it takes; what is noted stays while no file changes."
    known, lines = read_notes(path), Lines()
    todo = [o for o in items if known.get(o.nodeid, {}).get('stamp') != stamp(o)]
    sys.settrace(lines)
    threading.settrace(lines)
    start = time.time()
    with path.open('a') as notes:
        for item, found in reports(todo):
            seen, lines.seen = lines.seen, {}
            about = dict(test=item.nodeid, stamp=stamp(item), seconds=time.time()-start, failed=any(o.failed for o in found))
            print(json.dumps(about | dict(ran={k: sorted(o) for k, o in seen.items()})), file=notes, flush=True)
            start = time.time()
    return 0

def few(items, cases):
    "At most so many parameters of every test, evenly spread; all of those that were written for mutants."
    found = {}
    for o in items: found.setdefault(o.nodeid.partition('[')[0], []).append(o)
    return [o for k, same in found.items() for o in same[::1 if QUICK[0] in k else -(-len(same)//cases)]]

def chosen(m, traced, patience):
    "The tests that run a mutant's line, or else its function or module; those written for mutants and short ones first, of many files."
    ran = {k: o['ran'].get(m['path'], ()) for k, o in traced.items()}
    fits = [k for k, o in ran.items() if (m['line'] in o if m['at'] else o or QUICK[0] in k)] or [k for k, o in ran.items() if m['at'] in o]
    ranks, cost = Counter(), {}
    for k in sorted(fits, key=lambda k: traced[k]['seconds']):
        ranks[k.partition('::')[0]] += 1
        cost[k] = traced[k]['seconds']*(1 if QUICK[0] in k else ranks[k.partition('::')[0]])
    kept = []
    for k in sorted(cost, key=cost.get):
        if not kept or (patience := patience-traced[k]['seconds']) > 0: kept.append(k)
    return kept

class Loop:
    "In place of running the tests, tries every mutant on some of them."
    def __init__(self, args): self.args = args
    def pytest_runtestloop(self, session):
        items, notes = few(session.items, self.args.cases), self.args.out.with_suffix('.tests')
        forked(lambda: trace(items, notes), 7200)
        self.items, traced = {o.nodeid: o for o in items}, read_notes(notes)
        self.traced = {o: traced[o] for o in self.items if not traced[o]['failed']}
        print(len(self.traced), 'tests; these fail unchanged:', [o for o in self.items if o not in self.traced], flush=True)
        done = outcomes(self.args.out)
        with self.args.out.with_suffix('.jsonl').open('a') as log:
            for m in sample(self.args):
                if m['key'] not in done or done[m['key']] == 'survived' and not why(m['key']): self.one(m, log)
        return True
    def one(self, m, log):
        ids = chosen(m, self.traced, self.args.patience)
        items, limit = [self.items[o] for o in ids], 30+5*sum(self.traced[o]['seconds'] for o in ids)
        status = forked(lambda: run_here(items) if replace_code(m) else 2, limit) if m['at'] else 2
        if status == 2: status = forked(lambda: run_anew(m, ids), limit)
        outcome = {0: 'survived', 1: 'killed', None: 'timed out'}.get(status, 'crashed')
        print(json.dumps(dict(key=m['key'], outcome=outcome, tests=len(ids))), file=log, flush=True)
        if outcome == 'survived' and not why(m['key']): print(m['key'], f'({len(ids)} tests)', flush=True)

# --- what came out --------------------------------------------------------------------------------

def outcomes(out):
    "The last outcome of every mutant that was tried."
    path = out.with_suffix('.jsonl')
    return {o['key']: o['outcome'] for o in map(json.loads, path.read_text().splitlines())} if path.exists() else {}

def why(key): return next((o for k, o in EXPLAINED.items() if key.startswith(k)), None)

def summary(args):
    "Counts by module, and the survivors with their reasons."
    done, counts, left = outcomes(args.out), {}, []
    for m in sample(args):
        outcome = done.get(m['key'], 'not tried')
        if outcome == 'survived':
            left.append(dict(mutant=m['key'], why=why(m['key'])))
            outcome = 'explained' if why(m['key']) else 'survived'
        counts.setdefault(m['name'], Counter())[outcome] += 1
    return dict(modules=counts, total=sum(counts.values(), Counter()), survivors=left)

def main():
    p = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
    p.add_argument('--out', type=Path, required=True, help='record to write')
    p.add_argument('--most', type=int, default=24, help='mutants of a module')
    p.add_argument('--seed', type=int, default=0)
    p.add_argument('--only', default='', help='how the names of modules begin')
    p.add_argument('--cases', type=int, default=2, help='parameters of a test')
    p.add_argument('--patience', type=float, default=60., help='seconds of tests for a mutant')
    args = p.parse_args()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    pytest.main([*OPTIONS, *(str(TESTS/f'test_{o}.py') for o in QUICK)], [Loop(args)])
    from fisher_nodes.engine.files import write_record
    found = summary(args)
    write_record(args.out, seed=args.seed, most=args.most, **found)
    open_ones = found['total']['survived']
    print(dict(found['total']), f"survivors: {len(found['survivors'])},", f'{open_ones} without a reason' if open_ones else 'all explained')
    return int(open_ones > 0)

if __name__ == '__main__': sys.exit(main())
