"""What stands on the screen: in a terminal of 80 columns and in a pipe, from this package and from nobody else."""
import json
import logging
import os
import re
import shutil
import sys
import warnings
from pathlib import Path

import pytest
import screens
from transformers.utils import logging as transformers_logging

from fisher_nodes.app import cli

pytestmark = pytest.mark.skipif(sys.platform=='win32', reason='Windows has no pseudo-terminals')
TITLES = 'fine-tune: reviews', 'compare', 'load and check labels', 'own scores', 'average-k2', r'mask-fisher-k2-n8-s\d(: measuring)?'

@pytest.fixture(scope='module')
def made(tmp_path_factory):
    d, before = tmp_path_factory.mktemp('screens'), os.getcwd()
    try: screens.make(d)
    finally: os.chdir(before)
    return d

def stored(name):
    head, _, text = (screens.STORED/f'{name}.txt').read_text().partition('\n')
    assert head==f'$ fisher-nodes {screens.COMMANDS[name]}', 'run `python tests/screens.py`'
    return text

def check(name, text):
    "The stored screen, nothing wider than 80 but the one line of a mistake or a warning, and no other library."
    said = [o for o in text.split('\n') if not o.startswith('fisher-nodes ')]
    assert max(map(len, said))<=80, (name, max(said, key=len))
    if name.endswith('help') and sys.version_info[:2]!=(3, 11): return # `argparse` writes it otherwise in other versions
    assert screens.masked(text)==screens.masked(stored(name)), f'{name}: {text}\nIf that is meant, run `python tests/screens.py`'

def test_every_stored_screen_is_of_a_command():
    assert {o.stem for o in screens.STORED.glob('*.txt')}==set(screens.COMMANDS)

def test_in_a_terminal(made, tmp_path):
    for name, text in screens.in_terminal(shutil.copytree(made, tmp_path/'in')).items():
        shown, bars = screens.without_bars(text)
        check(name, shown)
        assert not [o for o in screens.NOISE if o in text], (name, text)
        assert all(len(o)<=80 for o in bars), name
        strange = [o for o in bars if not re.match(fr'({"|".join(TITLES)}): ', o.strip()) and not re.match(r' *\d+%\|', o)]
        assert not strange, (name, strange)

def test_in_a_pipe(made, tmp_path, capsys, monkeypatch):
    "The same, standard output before standard error; and no bars."
    monkeypatch.chdir(shutil.copytree(made, tmp_path/'in'))
    monkeypatch.setenv('FISHER_NODES_GLUE', str(tmp_path/'in'/'glue'))
    monkeypatch.setenv('COLUMNS', '80')
    for name, line in screens.COMMANDS.items():
        if name=='warning': os.rename('topics', 'elsewhere')
        try: cli.main(line.split())
        except SystemExit: pass
        found = capsys.readouterr()
        if name=='warning': assert len(found.err.strip().split('\n'))==1 and 'own models and their average are not shown' in found.err
        elif name!='mistake': assert found.err=='', name
        check(name, '\n'.join(o.rstrip() for o in (found.err+found.out).replace(f'{tmp_path}/in/', '').split('\n')).strip('\n')+'\n')

def settings():
    logger = logging.getLogger('transformers')
    return logging.root.manager.disable, warnings.showwarning, list(warnings.filters), logger.level, transformers_logging.is_progress_bar_enabled()

@pytest.mark.filterwarnings('default')
def test_others_are_silent_and_settings_come_back(monkeypatch, capsys):
    "Warnings and logs of a library stay unseen, ours and those of the user's own file are told; after a failure too."
    import transformers.trainer as library
    foreign = compile('def say(): import warnings; warnings.warn("of a library")', library.__file__, 'exec')
    space = dict(__name__=library.__name__); exec(foreign, space)
    def work(args):
        space['say']()
        logging.getLogger('transformers').warning('logged'); logging.getLogger('datasets').warning('logged'); logging.getLogger('torch.any').warning('logged')
        warnings.warn('of mine')
        cli.either.__globals__['warnings'].warn('of the package', stacklevel=2)
        raise ValueError('it failed')
    monkeypatch.setitem(cli.COMMANDS, 'convert', (work, *cli.COMMANDS['convert'][1:]))
    work.__doc__ = 'x'
    before = settings()
    assert cli.main(['convert', 'x', '--out', 'y'])==2 and settings()==before
    assert capsys.readouterr().err.splitlines()==[f'fisher-nodes convert: {o}' for o in ('of mine', 'of the package', 'it failed')]
    monkeypatch.setenv('FISHER_NODES_DEBUG', '1')
    with pytest.warns(UserWarning, match='of a library'), pytest.raises(ValueError): cli.main(['convert', 'x', '--out', 'y'])

def test_the_score_of_finetune_comes_first(made, tmp_path, monkeypatch, capsys):
    "And for programs the whole record."
    monkeypatch.chdir(shutil.copytree(made, tmp_path/'in'))
    line = 'finetune start --data reviews.csv --validation more-reviews.csv --epochs 1 --out'.split()
    assert cli.main([*line, 'a'])==0
    out = capsys.readouterr().out.split('\n')
    assert out[0].split()==['accuracy'] and re.fullmatch(r'more-reviews.csv +0\.\d{4}', out[1])
    assert cli.main([*line, 'b', '--json'])==0
    assert {'scores', 'base_hash', 'versions'}<=set(json.loads(capsys.readouterr().out))

def test_the_page_shows_the_help_of_today():
    "The stored texts have every option of every command, and no other."
    cells = json.loads((Path(__file__).parent.parent/'nbs/app/02_cli.ipynb').read_text())['cells']
    text, = (''.join(o['data']['text/markdown']) for c in cells for o in c.get('outputs', ()) if '**demo**' in str(o.get('data')))
    shown = {name: set(re.findall(r'--[a-z][\w-]*', usage)) for name, usage in re.findall(r'\*\*(\w+)\*\*\n\n```text\n(.*?)\n\n', text, re.S)}
    def options(name): return {o for a in cli.make_parser(name)._subparsers._group_actions[0].choices[name]._actions for o in a.option_strings}
    assert shown=={name: {o for o in options(name) if o.startswith('--')}-{'--help'} for name in cli.COMMANDS}
