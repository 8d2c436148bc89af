"""Arguments by chance at every public function: how many came out fine, were refused clearly, or neither.

`python tests/faults/properties.py --out FILE` runs 500 an entry point; tests/test_properties.py says what they are."""
import argparse, sys, time
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import conftest # noqa: F401, one thread, no network
import hypothesis
from hypothesis import Phase, given, seed, settings

from fisher_nodes.engine.files import write_record
from test_properties import ENTRIES, GOOD, HOW, a_world, call

OUTCOMES = (*GOOD, 'unclear', 'wrong', 'changed')

def run(world, name, number, start=0, tell=lambda *o: None):
    "Counts of an entry point, and what came out badly."
    counts, bad = Counter(), {}
    @seed(start)
    @settings(max_examples=number, phases=[Phase.generate], derandomize=False, **HOW)
    @given(ENTRIES[name].arguments)
    def one(case):
        outcome, said = call(world, name, case)
        counts[outcome] += 1
        if outcome in GOOD: return
        if said not in bad: tell(name, outcome, said, case)
        bad[said] = dict(outcome=outcome, said=said[:1000], case=repr(case)[:1000])
    one()
    return counts, list(bad.values())

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--out', type=Path, required=True)
    p.add_argument('--number', type=int, default=500, help='examples an entry point')
    p.add_argument('--start', type=int, default=0, help='seed')
    p.add_argument('--entry', nargs='+', choices=list(ENTRIES), default=list(ENTRIES))
    args = p.parse_args()
    out, found, bad = args.out.absolute(), {}, {}
    with a_world() as world:
        for name in args.entry:
            start = time.time()
            counts, bad[name] = run(world, name, args.number, args.start, lambda *o: print(*(ascii(v)[:1500] for v in o), flush=True))
            found[name] = dict(examples=sum(counts.values()), **{o: counts[o] for o in OUTCOMES})
            print(f'{name:24}', *(f'{o} {counts[o]:4}' for o in OUTCOMES), f'{time.time()-start:.0f} s', flush=True)
    total = {k: sum(o[k] for o in found.values()) for k in ('examples', *OUTCOMES)}
    write_record(out, what='arguments by chance', hypothesis=hypothesis.__version__, seed=args.start, **total, entries=found, bad={k: o for k, o in bad.items() if o})
    return int(any(bad.values()))

if __name__ == '__main__': sys.exit(main())
