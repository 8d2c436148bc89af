"""What the commands show in a terminal of 80 columns, stored in `screens/*.txt`.

    python tests/screens.py      # writes them again

A stored screen is as it came. Two screens are alike when they are so after `masked`: every number is 0, with its sign or without, and any
spaces beside each other are two. So numbers, seconds and the width that they take may differ, and nothing else."""
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
STORED = HERE/'screens'
END = '<<< end of a command >>>'
BOTH = 'reviews=reviews topics=topics'
DATA = 'reviews=reviews.csv topics=topics.csv'
COMMANDS = { # file -> command line; each runs in the folder that those before it left
    'help': '--help',
    'finetune-help': 'finetune --help',
    'finetune': 'finetune start --data reviews.csv --validation more-reviews.csv --epochs 2 --out tuned',
    'fisher': 'fisher reviews --data reviews.csv --num-samples 8 --out reviews.safetensors',
    'merge': f'merge {BOTH} --data {DATA} --num-samples 8 --out both',
    'merge-best': f'merge {BOTH} --data {DATA} --method best --out best',
    'evaluate': 'evaluate both --data reviews=more-reviews.csv topics=more-topics.csv --out scores.json',
    'evaluate-one': 'evaluate reviews --data more-reviews.csv',
    'compare': f'compare {BOTH} --data {DATA} --methods average,mask-fisher,best,ties --base start --save winner',
    'predict': 'predict both --data more-reviews.csv',
    'describe': 'describe start --check',
    'reproduce': 'reproduce --checkpoints glue-models --tasks qnli,sst2,rte --samples 8 --seeds 2 --out results',
    'report': 'report results --out summary',
    'mistake': 'merge reviews=reviews reviews=topics --method average --out none',
    'warning': 'evaluate both --data reviews=more-reviews.csv topics=more-topics.csv'} # whose own models went elsewhere
NOISE = 'Loading weights', 'Writing model shards', "{'loss'", 'LOAD REPORT', 'Warning:', 'UNEXPECTED', '/site-packages/'

def make(folder):
    "Models that share one body, so that every merge of them is that body, and rows for them."
    import random

    import test_cli
    import test_grid
    os.chdir(folder)
    for name, n in (('start', 2), ('reviews', 2), ('topics', 3)): test_cli.save_model(name, n)
    for name, n, rows in (('reviews', 2, 150), ('topics', 3, 150), ('more-reviews', 2, 6), ('more-topics', 3, 12)):
        rng, labels = random.Random(name), [f'class {"abc"[i % n]}' for i in range(rows)]
        lines = [f'{" ".join(rng.choices(test_cli.WORDS[4:], k=rng.randint(2, 12)))},{o}' for o in labels]
        Path(f'{name}.csv').write_text('\n'.join(['text,label', *lines])+'\n')
    test_grid.make_checkpoints(Path('glue'), Path('glue-models'))

def run_all(folder):
    "In a terminal: every command, in one process."
    from fisher_nodes.app.cli import main
    os.chdir(folder)
    for name, line in COMMANDS.items():
        if name=='warning': os.rename('topics', 'elsewhere')
        try: main(line.split())
        except SystemExit: pass
        print(END, flush=True)

def in_terminal(folder, columns=80):
    "All that reaches a terminal, by command."
    import fcntl
    import pty
    import struct
    import termios
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack('HHHH', 40, columns, 0, 0))
    env = {k: v for k, v in os.environ.items() if k not in ('COLUMNS', 'TQDM_DISABLE', 'FISHER_NODES_DEBUG')}
    env |= dict(PYTHONPATH=f'{HERE.parent}:{HERE}', FISHER_NODES_GLUE=f'{folder}/glue', HF_HUB_OFFLINE='1', OMP_NUM_THREADS='1', TERM='xterm')
    child = subprocess.Popen([sys.executable, __file__, 'run', str(folder)], env=env, stdin=theirs, stdout=theirs, stderr=theirs)
    os.close(theirs)
    found = b''
    while True:
        try: part = os.read(ours, 65536)
        except OSError: break # Linux says so at its end
        if not part: break
        found += part
    child.wait()
    parts = found.decode().replace(f'{folder}/', '').replace('\r\n', '\n').split(f'{END}\n')
    assert child.returncode==0 and len(parts)==len(COMMANDS)+1, found.decode()[-3000:]
    return dict(zip(COMMANDS, parts))

def without_bars(text):
    "What stays when bars are drawn over, and the bars."
    drawn = re.split(r'\r|\n|\x1b\[A', text)
    bars = [o for o in drawn if re.search(r'\d+%\|', o)]
    rest = re.sub(r'[^\r\n]*\d+%\|[^\r\n]*?\[[^\]\r\n]*\]', '', text).replace('\r', '').replace('\x1b[A', '')
    return '\n'.join(o.rstrip() for o in rest.split('\n')).strip('\n')+'\n', bars

def masked(text): return re.sub(r' {2,}', '  ', re.sub(r'[+-]?\d+(?:\.\d+)?(?:e-?\d+)?', '0', text))

if __name__=='__main__':
    if sys.argv[1:2]==['run']: run_all(sys.argv[2])
    else:
        sys.path.insert(0, str(HERE.parent))
        with tempfile.TemporaryDirectory() as d:
            make(d)
            found = {STORED/f'{k}.txt': f'$ fisher-nodes {COMMANDS[k]}\n{without_bars(text)[0]}' for k, text in in_terminal(d).items()}
        new = {path: text for path, text in found.items() if not path.exists() or masked(path.read_text())!=masked(text)}
        for path, text in new.items(): path.write_text(text)
        print(f'{len(found)} screens, of which {len(new)} are other than in {STORED}: {", ".join(o.stem for o in new)}')
