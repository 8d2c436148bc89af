"""Examples of inputs that are easily misread, by kind, each against a slow reference or a refusal that is due.

`python tests/faults/inputs.py --out FILE` runs tests/test_inputs.py and counts what came of every example;
the kinds are the headings in that file."""
import argparse, os, re, sys
from collections import Counter
from pathlib import Path

HERE = Path(__file__).resolve()
TESTS = HERE.parents[1]
sys.path.insert(0, str(TESTS))
os.environ.update(OMP_NUM_THREADS='1', HF_HUB_OFFLINE='1', TOKENIZERS_PARALLELISM='false')

import pytest
from fisher_nodes.engine.files import write_record

def kinds(text):
    "Test function -> the heading it stands under."
    found, kind = {}, None
    for line in text.splitlines():
        if heading := re.match(r'# --- (.+?) -+$', line): kind = heading[1]
        if test := re.match(r'def (test_\w+)', line): found[test[1]] = kind
    return found

class Counts:
    "Outcomes by kind."
    def __init__(self, of): self.of, self.counts = of, {k: Counter() for k in dict.fromkeys(of.values())}

    def pytest_runtest_logreport(self, report):
        name = report.nodeid.rpartition('::')[2].partition('[')[0]
        if report.when == 'call' or report.failed: self.counts[self.of[name]][report.outcome] += 1

def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--out', required=True, type=Path)
    args = parser.parse_args()
    file = TESTS/'test_inputs.py'
    plugin = Counts(kinds(file.read_text()))
    status = pytest.main(['-q', '-n', '0', '-p', 'no:cacheprovider', str(file)], plugins=[plugin])
    rows = {k: dict(examples=sum(o.values()), wrong=o['failed']) for k, o in plugin.counts.items()}
    write_record(args.out.absolute(), what='misread inputs', kinds=rows, examples=sum(o['examples'] for o in rows.values()), wrong=sum(o['wrong'] for o in rows.values()))
    return int(status)

if __name__ == '__main__': sys.exit(main())
