"""Mutation testing: change one thing in the package, and see whether a test notices.

    python tests/faults/mutants.py --out _proof/mutants.json [--most 60] [--seed 0] [--only core.averaging]

One pytest session collects the quick tests; a first fork notes which lines each of them runs. Then every
mutant is a fork of that session: the function's code is replaced there (or, for what stands outside of functions,
everything is imported anew from the changed source), and the tests that run its line are tried until one fails. Tools that
were tried pass over decorated functions, and here nearly all are: `@patch`, `@contextmanager`, `@merge_method`.
No words are changed: not those of messages, docstrings, types.
The outcome of each mutant is kept beside the record, in `FILE.jsonl`; a second run tries only the survivors again.
A survivor is a missing test, dead code, or has its reason in `EXPLAINED`."""
import argparse, ast, copy, gc, json, os, random, signal, sys, threading, time
from collections import Counter
from importlib.machinery import PathFinder, SourceFileLoader
from pathlib import Path
import pytest
from _pytest.runner import runtestprotocol
os.environ.update(OMP_NUM_THREADS='1', HF_HUB_OFFLINE='1', TOKENIZERS_PARALLELISM='false')

HERE = Path(__file__).resolve()
ROOT, TESTS = HERE.parents[2], HERE.parents[1]
QUICK = [f'test_{o}.py' for o in ('survivors', 'rules', 'merge', 'nodes', 'masks_fisher', 'grams', 'released', 'fixtures', 'own_method',
                                  'mended', 'parameters', 'inputs', 'rivals', 'recipe', 'purity', 'saving', 'bad_input', 'streaming', 'roundtrip')]
SLOW = 'shell or entry_point or grid or threads or importing or compiled' # tests that start processes
FOLDERS = ('core', 'methods', 'engine', 'merging')
ENGINE = ('guard', 'devices', 'classes', 'text')

EXPLAINED = { # how the key of a survivor begins -> why no test can notice
}

SWAPS = {ast.Eq: '!=', ast.NotEq: '==', ast.Lt: '<=', ast.LtE: '<', ast.Gt: '>=', ast.GtE: '>', ast.In: 'not in', ast.NotIn: 'in',
         ast.Is: 'is not', ast.IsNot: 'is', ast.Add: '-', ast.Sub: '+', ast.Mult: '/', ast.Div: '*', ast.FloorDiv: '*', ast.Mod: '*',
         ast.LShift: '>>', ast.RShift: '<<', ast.BitAnd: '|', ast.BitOr: '&', ast.And: 'or', ast.Or: 'and'}

def swap(op):
    tree = ast.parse(f'a {SWAPS[type(op)]} b', mode='eval').body
    return tree.ops[0] if isinstance(tree, ast.Compare) else tree.op

def changed(node, **kw):
    new = copy.copy(node)
    for k, v in kw.items(): setattr(new, k, v)
    return new

def variants(node):
    "What may stand in place of a node."
    if isinstance(node, ast.Compare) and type(node.ops[0]) in SWAPS: yield changed(node, ops=[swap(node.ops[0]), *node.ops[1:]])
    elif isinstance(node, (ast.BinOp, ast.BoolOp, ast.AugAssign)) and type(node.op) in SWAPS: yield changed(node, op=swap(node.op))
    elif isinstance(node, ast.UnaryOp): yield node.operand
    elif isinstance(node, ast.Constant) and isinstance(node.value, bool): yield changed(node, value=not node.value)
    elif isinstance(node, ast.Constant) and isinstance(node.value, (int, float)): yield changed(node, value=node.value+1)
    elif isinstance(node, (ast.If, ast.IfExp, ast.While)): yield from (changed(node, test=ast.Constant(o)) for o in (True, False))
    elif isinstance(node, ast.comprehension) and node.ifs: yield changed(node, ifs=[])
    elif isinstance(node, ast.Raise) or isinstance(node, ast.Expr) and isinstance(node.value, ast.Call): yield ast.Pass()
    elif isinstance(node, ast.Return) and not (node.value is None or isinstance(node.value, ast.Constant)): yield ast.Return(ast.Constant(None))
    elif isinstance(node, ast.Call):
        yield from (changed(node, keywords=[o for o in node.keywords if o is not k]) for k in node.keywords if k.arg)

WORDS = (ast.JoinedStr, ast.Raise, ast.arg) # what is inside are words and types

def nodes(node, path=()):
    "Every node that may change, with those around it."
    yield node, path
    for field, o in ast.iter_fields(node):
        if field in ('annotation', 'returns') or isinstance(node, WORDS): continue
        for child in o if isinstance(o, list) else [o]:
            if isinstance(child, ast.AST): yield from nodes(child, (*path, node))

class Put(ast.NodeTransformer):
    def __init__(self, old, new): self.old, self.new = old, new
    def visit(self, node): return ast.copy_location(self.new, node) if node is self.old else self.generic_visit(node)

def text(node): return ' '.join(ast.unparse(ast.fix_missing_locations(node)).split())[:80]

def mutants(name):
    "Every mutant of a module: `key`, the code it is in (outermost function and line; None outside of functions), how to make it."
    path = ROOT/f'fisher_nodes/{name.replace(".", "/")}.py'
    tree, lines, seen = ast.parse(path.read_text()), path.read_text().splitlines(), Counter()
    for node, around in nodes(tree):
        i = next((i for i, o in enumerate(around) if isinstance(o, (ast.FunctionDef, ast.Lambda))), None)
        body = [] if i is None else around[i].body if isinstance(around[i].body, list) else [around[i].body]
        inside = any(o in body for o in (*around[i or 0:], node))
        for new in variants(node):
            at = getattr(node, 'lineno', None) or node.iter.lineno
            key = f'{name} | {lines[at-1].strip()} | {text(node)} -> {text(new)}'
            seen[key] += 1
            yield dict(key=key+f' #{seen[key]}'*(seen[key] > 1), path=str(path), name=name, at=first_line(around[i]) if inside else None,
                       line=at, tree=tree, put=Put(node, new))

def first_line(f): return min([f.lineno, *(o.lineno for o in getattr(f, 'decorator_list', []))])

def compiled(m): return compile(ast.fix_missing_locations(m['put'].visit(m['tree'])), m['path'], 'exec')

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
    return pytest.main([*OPTIONS, *dict.fromkeys(str(ROOT/o.partition('::')[0]) for o in ids)], [Only(ids)]) not in (0, 5)

def reports(items):
    for a, b in zip(items, [*items[1:], None]): yield a, runtestprotocol(a, nextitem=b, log=False)

def run_here(m, items): return any(o.failed for _, found in reports(items) for o in found)

def forked(job, limit):
    "What a job gives, 0 or 1, in a process of its own; None if it took too long, 3 for an error of ours."
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

class Lines:
    "Which lines of the package are run."
    def __init__(self): self.seen = {}
    def __call__(self, frame, event, arg):
        if not frame.f_code.co_filename.startswith(str(ROOT/'fisher_nodes')): return None
        self.seen.setdefault(frame.f_code.co_filename, set()).add(frame.f_lineno) # a call: the function's first line
        return self

def trace(items, path):
    "Write which lines every test runs, and how long it takes; what is written already stays while no file has changed."
    last = path.stat().st_mtime if path.exists() else 0
    changed = any(o.stat().st_mtime > last for o in [*(ROOT/'fisher_nodes').rglob('*.py'), TESTS/'reference.py'])
    out, lines = {} if changed else json.loads(path.read_text()), Lines()
    sys.settrace(lines)
    threading.settrace(lines)
    start = time.time()
    for item, found in reports([o for o in items if o.nodeid not in out or o.path.stat().st_mtime > last]):
        seen, lines.seen = lines.seen, {}
        out[item.nodeid] = dict(ran={k: sorted(o) for k, o in seen.items()}, seconds=time.time()-start, failed=any(o.failed for o in found))
        start = time.time()
    path.write_text(json.dumps(out))

def chosen(m, traced, patience):
    "The tests that run a mutant's line, or else its module; the shortest of every file first."
    ran = {k: o['ran'].get(m['path'], ()) for k, o in traced.items()}
    fits = [k for k, o in ran.items() if (m['line'] in o if m['at'] else o)] or [k for k, o in ran.items() if m['at'] in o]
    ranks, order = Counter(), []
    for k in sorted(fits, key=lambda k: traced[k]['seconds']):
        file = k.partition('::')[0]
        order.append((ranks[file], traced[k]['seconds'], k))
        ranks[file] += 1
    kept = []
    for _, seconds, k in sorted(order):
        if not kept or (patience := patience-seconds) > 0: kept.append(k)
    return kept

def few(items, cases):
    "At most so many parameters of every test, evenly spread."
    found = {}
    for o in items: found.setdefault(o.nodeid.partition('[')[0], []).append(o)
    return [o for same in found.values() for o in same[::-(-len(same)//cases)]]

class Loop:
    "In place of running the tests, tries every mutant on some of them."
    def __init__(self, args): self.args = args
    def pytest_runtestloop(self, session):
        notes = self.args.out.with_suffix('.tests')
        session.items[:] = few(session.items, self.args.cases)
        forked(lambda: trace(session.items, notes) or 0, 7200)
        traced = json.loads(notes.read_text())
        traced = {o.nodeid: traced[o.nodeid] for o in session.items if not traced[o.nodeid]['failed']}
        print(len(traced), 'tests,', [o.nodeid for o in session.items if o.nodeid not in traced], 'fail unchanged', flush=True)
        self.items = {o.nodeid: o for o in session.items}
        done, log = read_log(self.args.out), self.args.out.with_suffix('.jsonl').open('a')
        for m in sample(self.args):
            if done.get(m['key'], 'survived') != 'survived': continue
            outcome, ids, start = *self.one(m, traced), time.time()
            log.write(json.dumps(dict(key=m['key'], outcome=outcome, tests=len(ids)))+'\n')
            log.flush()
            if outcome == 'survived' and not why(m['key']): print(m['key'], f'({len(ids)} tests)', flush=True)
        return True

    def one(self, m, traced):
        ids = chosen(m, traced, self.args.patience)
        items, limit = [self.items[o] for o in ids], 30+5*sum(traced[o]['seconds'] for o in ids)
        if not ids: return 'survived', ids
        status = forked(lambda: run_here(m, items) if replace_code(m) else 2, limit) if m['at'] else 2
        if status == 2: status = forked(lambda: run_anew(m, ids), limit)
        return {0: 'survived', 1: 'killed', None: 'timed out'}.get(status, 'crashed'), ids

def read_log(out):
    "The last outcome of every mutant that was tried."
    path = out.with_suffix('.jsonl')
    lines = path.read_text().splitlines() if path.exists() else []
    return {o['key']: o['outcome'] for o in map(json.loads, lines)}

def why(key): return next((o for k, o in EXPLAINED.items() if key.startswith(k)), None)

def sample(args):
    "Some mutants of every module."
    for folder in FOLDERS:
        for path in sorted((ROOT/'fisher_nodes'/folder).glob('[a-z]*.py')):
            name = f'{folder}.{path.stem}'
            if (folder == 'engine' and path.stem not in ENGINE) or not name.startswith(args.only): continue
            found = list(mutants(name))
            random.Random(f'{args.seed} {name}').shuffle(found)
            yield from found[:args.most]

def summary(args):
    "Counts by module, and the survivors with their reasons."
    done, counts, left = read_log(args.out), {}, []
    for m in sample(args):
        outcome = done.get(m['key'], 'not tried')
        if outcome == 'survived':
            outcome = 'explained' if why(m['key']) else 'survived'
            left.append(dict(mutant=m['key'], why=why(m['key'])))
        counts.setdefault(m['name'], Counter())[outcome] += 1
    return dict(modules=counts, total=sum(counts.values(), Counter()), survivors=left)

OPTIONS = ['-x', '-q', '-s', '-o', 'addopts=', '-p', 'no:xdist', '-p', 'no:cacheprovider', f'--rootdir={ROOT}',
           '-k', f'not ({SLOW})']

def main():
    p = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
    p.add_argument('--out', type=Path, required=True, help='record to write')
    p.add_argument('--most', type=int, default=40, help='mutants of a module')
    p.add_argument('--seed', type=int, default=0)
    p.add_argument('--only', default='', help='how the names of modules begin')
    p.add_argument('--cases', type=int, default=2, help='parameters of a test')
    p.add_argument('--patience', type=float, default=12., help='seconds of tests for a mutant')
    args = p.parse_args()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    pytest.main([*OPTIONS, *(str(TESTS/o) for o in QUICK)], [Loop(args)])
    from fisher_nodes.engine.files import write_record
    found = summary(args)
    write_record(args.out, seed=args.seed, most=args.most, **found)
    print(dict(found['total']))
    return int(found['total']['survived'] > 0)

if __name__ == '__main__': sys.exit(main())
