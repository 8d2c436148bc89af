"""Nothing is lost: old results until new ones are whole, other people's files always; what is stored is checked."""
import json
import os
import shutil
import signal
import stat
import time
from pathlib import Path

import pytest
import torch
import yaml
from datasets import Dataset

from fisher_nodes import MaskFisher, Merged, ParameterFisher, finetune, merge, run_recipe
from fisher_nodes.app.cli import main
from fisher_nodes.engine import files
from fisher_nodes.engine.files import OutputExistsError, check_folder, whole_file, whole_folder
from fisher_nodes.merging import store
from fisher_nodes.merging.run import merge_files
from reference import examples, tiny
from test_cli import save_model, save_rows

OLD = Path(__file__).parent/'fixtures'/'v01'

@pytest.fixture
def here(tmp_path):
    for i, t in enumerate('ab'): tiny(seed=i, dtype=torch.float32).save_pretrained(tmp_path/t)
    return tmp_path

def models(here): return {t: here/t for t in 'ab'}

def contents(folder): return {o.relative_to(folder).as_posix(): o.read_bytes() for o in sorted(Path(folder).rglob('*')) if o.is_file()}

def average(here, **kw): return merge_files(models(here), method='average', out=here/'out', progress=False, **kw)

def hidden(folder): return [o.name for o in Path(folder).iterdir() if o.name.startswith('.')]

def others(out):
    "What other people have in the same folder."
    for name in ('notes.txt', '2024_Pooling/config.json', 'model_of_mine.safetensors', 'c.fisher.safetensors'):
        (out/name).parent.mkdir(exist_ok=True)
        (out/name).write_text('mine')
    return {k: v for k, v in contents(out).items() if v == b'mine'}


# --- overwriting ------------------------------------------------------------------------------

def test_only_what_an_earlier_merge_lists_is_replaced(here):
    average(here)
    mine = others(here/'out')
    average(here, overwrite=True, max_shard_size='20KB')
    now = contents(here/'out')
    assert len(mine) == 4 and mine.items() <= now.items() and 'model.safetensors' not in now and list(Merged.from_pretrained(here/'out')) == ['a', 'b']

@pytest.mark.parametrize('name', ['README.md', 'recipe.yml', 'config.json', 'a/config.json', 'a/notes.txt', 'model.safetensors'])
def test_what_was_changed_since_is_not_replaced(here, name):
    average(here)
    with open(here/'out'/name, 'a') as f: f.write('my words')
    before = contents(here)
    with pytest.raises(OutputExistsError, match='is not as .*merge_report.json lists it; move it away') as e: average(here, overwrite=True)
    assert (here/'out'/name).samefile(str(e.value).split(' is not as')[0])
    with pytest.raises(OutputExistsError, match='is not as'): merge(models(here), method='average').save_pretrained(here/'out', overwrite=True)
    assert contents(here) == before

def test_a_damaged_weight_can_be_replaced(here):
    average(here)
    flip(here/'out'/'model.safetensors', -3)
    average(here, overwrite=True)
    Merged.from_pretrained(here/'out')

@pytest.mark.parametrize('folder', ['merged', 'merged-files'])
def test_a_merge_of_version_0_1_is_replaced(here, folder):
    shutil.copytree(OLD/folder, here/'out')
    mine = others(here/'out')
    average(here, overwrite=True)
    now = contents(here/'out')
    assert mine.items() <= now.items() and not any(o.startswith(('first', 'second')) for o in now)
    assert list(Merged.from_pretrained(here/'out')) == ['a', 'b']

def test_a_folder_that_only_has_a_tasks_name_stays(here):
    shutil.copytree(OLD/'merged', here/'out')
    (here/'out'/'first'/'thesis.tex').write_text('mine')
    before = contents(here/'out')
    with pytest.raises(OutputExistsError, match='first/thesis.tex is not as'): average(here, overwrite=True)
    assert contents(here/'out') == before

@pytest.mark.parametrize('listed', [{'thesis.tex': dict(size=4, hash='0'*16)}, {'../outside/x': {}}, {'a/../../outside/x': {}}, {'/etc/hosts': {}}, dict(x=1), []], ids=str)
def test_a_planted_report_deletes_nothing(here, listed):
    (here/'out').mkdir(); (here/'outside').mkdir()
    for o in ('out/thesis.tex', 'outside/x'): (here/o).write_text('mine')
    (here/'out'/'merge_report.json').write_text(json.dumps(dict(tasks=dict(a={}, outside={}), files=listed)))
    try: average(here, overwrite=True)
    except ValueError: pass # it is no report, or what it lists is not there
    assert (here/'out'/'thesis.tex').read_text() == (here/'outside'/'x').read_text() == 'mine'

def test_a_result_of_another_kind_without_a_list_is_refused(here):
    shutil.copytree(OLD/'merged', here/'out')
    with pytest.raises(OutputExistsError, match='merge_report.json is of another result and lists no files'):
        finetune(here/'a', Dataset.from_list(examples(4, 2)), out=here/'out', overwrite=True, progress=False)
    assert contents(here/'out') == contents(OLD/'merged')

def test_a_tokenizer_never_stays_beside_another_model(tmp_path):
    for i, t in enumerate('ab'): save_model(tmp_path/t, 2, seed=i)
    merge(models(tmp_path), method='average').save_pretrained(tmp_path/'out')
    assert (tmp_path/'out'/'tokenizer.json').exists()
    bare = {t: tiny(seed=i, dtype=torch.float32) for i, t in enumerate('ab')}
    merge(bare, method='average').save_pretrained(tmp_path/'out', overwrite=True)
    assert not list((tmp_path/'out').rglob('tokenizer*'))

def inputs(here):
    for t in 'ab':
        save_model(here/t, 2, seed=3); save_rows(here/f'{t}.csv', [0, 1]*4)
        MaskFisher(torch.ones(2, 4), torch.ones(2, 24)).save(here/f'{t}.fisher.safetensors')

@pytest.mark.parametrize('what', ['model', 'Fisher', 'data'])
def test_what_is_read_cannot_lie_in_what_is_written(tmp_path, what, capsys):
    (tmp_path/'out').mkdir()
    inputs(tmp_path/'out')
    shutil.copytree(tmp_path/'out', tmp_path/'in')
    place = {o: tmp_path/('out' if o == what else 'in') for o in ('model', 'Fisher', 'data')}
    line = ['merge', *(f'{t}={place["model"]/t}' for t in 'ab'), '--out', str(tmp_path/'out'), '--overwrite']
    option, suffix = ('--data', '.csv') if what == 'data' else ('--fisher', '.fisher.safetensors')
    line += [option, *(f'{t}={place["data" if what == "data" else "Fisher"]/t}{suffix}' for t in 'ab')]
    before = contents(tmp_path)
    assert main(line) == 2 and f"the {what} of 'a'" in capsys.readouterr().err
    if what == 'Fisher':
        with pytest.raises(OutputExistsError, match="Fisher of 'a'"):
            merge_files({t: tmp_path/'in'/t for t in 'ab'}, {t: tmp_path/'out'/f'{t}.fisher.safetensors' for t in 'ab'}, out=tmp_path/'out', overwrite=True)
    assert contents(tmp_path) == before

def test_a_recipe_does_not_replace_itself(here):
    average(here)
    with pytest.raises(OutputExistsError, match="the recipe of 'recipe.yml'"): run_recipe(here/'out'/'recipe.yml', here/'out', overwrite=True)

def test_what_training_starts_from_is_not_replaced(here):
    before = contents(here)
    for out in (here/'a', here):
        with pytest.raises(OutputExistsError, match="model of 'base'"): finetune(here/'a', Dataset.from_list(examples(4, 2)), out=out, overwrite=True, progress=False)
    assert contents(here) == before

def test_somebody_elses_tokenizer_is_refused_before_training(here):
    (here/'out').mkdir(); (here/'out'/'vocab.txt').write_text('mine')
    with pytest.raises(OutputExistsError, match='vocab.txt is there and not from an earlier'):
        finetune(here/'a', Dataset.from_list(examples(4, 2)), out=here/'out', overwrite=True, progress=False)

@pytest.mark.parametrize('error', [OSError(28, 'No space left on device'), KeyboardInterrupt()], ids=repr)
def test_a_failure_while_moving_puts_the_old_back(here, monkeypatch, error):
    average(here)
    others(here/'out')
    before, replace, count = contents(here/'out'), os.replace, [0]
    def fail(*args):
        count[0] += 1
        if count[0] == 9: raise error
        replace(*args)
    monkeypatch.setattr(os, 'replace', fail)
    with pytest.raises(type(error)): average(here, overwrite=True, weights=[1, 2])
    assert count[0] > 9 and contents(here/'out') == before and not hidden(here/'out')


# --- locks ------------------------------------------------------------------------------------

def forked(run):
    "A process that runs something, and tells this one how far it is; and where to read that."
    read, write = os.pipe()
    if (pid := os.fork()) == 0:
        try: run(lambda text: os.write(write, f'{text}\n'.encode()))
        finally: os._exit(0)
    os.close(write)
    return pid, os.fdopen(read)

def holder(block, *args):
    "A process inside a block."
    def run(say):
        with block(*args):
            say('inside')
            time.sleep(100)
    pid, told = forked(run)
    assert told.readline() == 'inside\n'
    return pid

def end(pid):
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)

def test_who_writes_is_named_and_what_a_killed_one_left_goes(here):
    child = holder(whole_folder, here/'out', 'done.json')
    try:
        for run in (lambda: check_folder(here/'out', True), lambda: average(here), lambda: average(here, overwrite=True)):
            with pytest.raises(OutputExistsError) as e: run()
            for word in ('another process is writing', '.partial-lock', str(child), os.uname().nodename): assert word in str(e.value)
        assert '.partial-new' in hidden(here/'out')
    finally: end(child)
    average(here)
    assert not hidden(here/'out')

@pytest.mark.parametrize('name', ['.partial-1-abc', '.partial-{}-abc', '.partial-new', '.partial-lock'])
def test_nobody_is_blocked_by_a_number(here, name):
    "Process 1 always runs, as does this one: leftovers of version 0.1 with their numbers, or of today's, are nobody's."
    left = here/'out'/name.format(os.getpid())
    left.parent.mkdir()
    if name == '.partial-lock': left.write_text(json.dumps(dict(pid=1, host='elsewhere', since='then')))
    else: left.mkdir(); (left/'model.safetensors').touch()
    average(here)
    assert not hidden(here/'out')

def test_a_file_is_written_by_one_at_a_time(tmp_path, monkeypatch):
    monkeypatch.setattr(files, 'PATIENCE', .3)
    child = holder(whole_file, tmp_path/'a.txt')
    try:
        with pytest.raises(OutputExistsError, match=f'a.txt.lock is held by process {child}'), whole_file(tmp_path/'a.txt'): pass
        (tmp_path/'.a.txt.part').write_text('half')
    finally: end(child)
    (tmp_path/'.a.txt.999.part').write_text('half, of 0.1')
    (tmp_path/'.a.txtx.part').write_text("another file's")
    with whole_file(tmp_path/'a.txt') as o: o.write_text('whole')
    assert sorted(o.name for o in tmp_path.iterdir()) == ['.a.txtx.part', 'a.txt']

def test_of_two_writers_one_wins(tmp_path):
    def run(say):
        while not (tmp_path/'go').exists(): pass
        try:
            with whole_folder(tmp_path/'out', 'done.json') as o:
                (o/'who').write_text(str(os.getpid()))
                (o/'done.json').write_text('{}')
                time.sleep(1)
            say('won')
        except OutputExistsError as e: say(e)
    two = [forked(run) for _ in range(2)]
    (tmp_path/'go').touch()
    said = {pid: told.read().strip() for pid, told in two}
    for pid in said: os.waitpid(pid, 0)
    won, = [k for k, v in said.items() if v == 'won']
    assert any(f'another process is writing to {tmp_path/"out"}' in o and str(won) in o for o in said.values()), said
    assert (tmp_path/'out'/'who').read_text() == str(won) and not hidden(tmp_path/'out')

def test_a_killed_first_write_does_not_block_the_second(here):
    "Killed when all was in and nobody told: the same command, without --overwrite, completes."
    average(here)
    (here/'out'/'.partial-old').mkdir()
    (here/'out'/'.partial-lock').write_text(json.dumps(dict(moving=['model.safetensors', 'merge_report.json'])))
    average(here, weights=[1, 2])
    assert Merged.from_pretrained(here/'out').recipe['weights'] == dict(a=1, b=2)
    with pytest.raises(OutputExistsError, match='is not empty'): average(here)


# --- permissions and disks --------------------------------------------------------------------

@pytest.mark.parametrize('umask', [0o022, 0o027, 0o002])
def test_files_are_as_readable_as_the_umask_says(here, umask):
    old = os.umask(umask)
    try:
        average(here)
        merge(models(here), method='average').save_pretrained(here/'again')
        MaskFisher(torch.ones(2, 4), torch.ones(2, 24)).save(here/'f.safetensors')
    finally: os.umask(old)
    made = [o for place in ('out', 'again') for o in (here/place).rglob('*')] + [here/'f.safetensors']
    for o in made: assert stat.S_IMODE(o.stat().st_mode) == (0o777 if o.is_dir() else 0o666) & ~umask, o

def test_everything_is_on_disk_before_the_old_goes(here, monkeypatch):
    average(here)
    log, sync, replace = [], os.fsync, os.replace
    monkeypatch.setattr(os, 'fsync', lambda f: (log.append(os.fstat(f if isinstance(f, int) else f.fileno()).st_ino), sync(f)))
    monkeypatch.setattr(os, 'replace', lambda a, b: (log.append('move'), replace(a, b)))
    average(here, overwrite=True)
    first = log.index('move')
    new = [o for o in (here/'out').rglob('*') if o.name not in hidden(here/'out')]
    assert {o.stat().st_ino for o in new} <= set(log[:first]), 'a file or folder moved before it was on disk'
    assert (here/'out').stat().st_ino in log[first:]
    counts = [log.count(o) for o in {o.stat().st_ino for o in new}]
    assert max(counts) == 1, 'once a file and once a folder'


# --- stored means checked ---------------------------------------------------------------------

def flip(path, byte, bit=0):
    content = bytearray(path.read_bytes())
    content[byte] ^= 1 << bit
    path.write_bytes(content)

def every_bit(path, load, step):
    "Flip bits all over a file; each must be told by one line that names it."
    whole = path.read_bytes()
    table = 8+int.from_bytes(whole[:8], 'little')
    for i in [*range(0, table), *range(table, len(whole), step)]:
        flip(path, i, i%8)
        with pytest.raises(ValueError) as e: load()
        assert path.name in str(e.value) and '\n' not in str(e.value), (i, str(e.value))
        path.write_bytes(whole)
    load()

@pytest.mark.parametrize('name', ['model.safetensors', 'a/model-00002-of-00002.safetensors'])
def test_a_flipped_bit_of_a_weight_is_named(tmp_path, name):
    merge({t: tiny(seed=i, vocab=12, dtype=torch.float32) for i, t in enumerate('ab')}, method='average').save_pretrained(tmp_path)
    files = [o for o in tmp_path.rglob('*.safetensors') if o.samefile(tmp_path/name)]
    whole = (tmp_path/name).read_bytes()
    size = 8+int.from_bytes(whole[:8], 'little')
    for i in (0, 3, 9, size//2, size-1, size, size+5, len(whole)-1, len(whole)//2):
        flip(tmp_path/name, i, i%8)
        with pytest.raises(ValueError) as e: Merged.from_pretrained(tmp_path)
        assert any(str(o) in str(e.value) for o in files) and '\n' not in str(e.value), (i, str(e.value))
        (tmp_path/name).write_bytes(whole)
    Merged.from_pretrained(tmp_path)

def test_copies_are_checked_as_links_are(tmp_path):
    merge({t: tiny(seed=i, dtype=torch.float32) for i, t in enumerate('ab')}, method='average').save_pretrained(tmp_path/'out')
    shutil.copytree(tmp_path/'out', tmp_path/'copy')
    flip(tmp_path/'copy'/'b'/'model-00001-of-00002.safetensors', -2)
    with pytest.raises(ValueError, match='copy/b/model-00001'): Merged.from_pretrained(tmp_path/'copy')
    (tmp_path/'copy'/'b'/'model-00001-of-00002.safetensors').unlink()
    with pytest.raises(ValueError, match='is not whole: b/model-00001'): Merged.from_pretrained(tmp_path/'copy')

def test_weights_that_are_not_listed_are_not_loaded(tmp_path):
    "transformers would take one file before several."
    merge({t: tiny(seed=i, dtype=torch.float32) for i, t in enumerate('ab')}, method='average').save_pretrained(tmp_path)
    tiny(seed=5, dtype=torch.float32).save_pretrained(tmp_path/'other')
    shutil.copy(tmp_path/'other'/'model.safetensors', tmp_path/'a')
    with pytest.raises(ValueError, match='a/model.safetensors is not among the files'): Merged.from_pretrained(tmp_path)

@pytest.mark.parametrize('kind', [MaskFisher, ParameterFisher])
def test_any_flipped_bit_of_a_statistic_is_named(tmp_path, kind):
    path = tmp_path/'f.safetensors'
    if kind is MaskFisher: made = MaskFisher(torch.rand(2, 4), torch.rand(2, 24), 7, dict(seed=0, variant='paper'))
    else: made = ParameterFisher(dict(w=torch.rand(3, 5), b=torch.rand(3)), 7, dict(seed=0))
    made.save(path)
    every_bit(path, lambda: kind.load(path), 1)

def big(here, method):
    from test_streaming import make, measure
    folders = make(here, 2, hidden=16, vocab=40)
    return folders, measure(method, folders, here)

def test_a_damaged_statistic_is_named_where_it_is_read_by_rows(tmp_path):
    folders, fishers = big(tmp_path, 'fisher')
    merge_files(folders, fishers, method='fisher', out=tmp_path/'whole', progress=False)
    flip(fishers['t1'], -4)
    with pytest.raises(ValueError, match='t1.fisher.safetensors is damaged'): merge_files(folders, fishers, method='fisher', out=tmp_path/'out', progress=False)
    assert not (tmp_path/'out').exists()

def test_files_of_version_0_1_load_without_a_hash(tmp_path):
    shutil.copytree(OLD, tmp_path/'old')
    assert 'files' not in json.loads((tmp_path/'old'/'merged'/'merge_report.json').read_text())
    Merged.from_pretrained(tmp_path/'old'/'merged')
    MaskFisher.load(tmp_path/'old'/'first.fisher.safetensors')

def test_a_fisher_file_is_pinned(here):
    fishers = {t: here/f'{t}.fisher.safetensors' for t in 'ab'}
    for i, o in enumerate(fishers.values()): MaskFisher(torch.ones(2, 4)+i, torch.ones(2, 24)).save(o)
    merge_files(models(here), fishers, out=here/'out', progress=False)
    entry = yaml.safe_load((here/'out'/'recipe.yml').read_text())['fishers']['a']
    assert entry.keys() == {'file', 'hash'} and entry['file'] == '../a.fisher.safetensors'
    run_recipe(here/'out'/'recipe.yml', here/'again', progress=False)
    assert (here/'again'/'model.safetensors').read_bytes() == (here/'out'/'model.safetensors').read_bytes()
    MaskFisher(torch.ones(2, 4)*9, torch.ones(2, 24)).save(fishers['a'])
    with pytest.raises(ValueError, match="the Fisher of 'a', .*a.fisher.safetensors, is not what it was"): run_recipe(here/'out'/'recipe.yml', here/'more', progress=False)
    assert not (here/'more').exists()
    run_recipe(here/'out'/'recipe.yml', here/'more', accept_changes=True, progress=False)

@pytest.mark.parametrize('entry', ['{fil: x}', '{file: 3}', '{file: x, sha: y}', '{hash: x}'])
def test_a_pin_is_checked(here, entry):
    (here/'r.yml').write_text(f'models: {{a: ./a, b: ./b}}\nfishers: {{a: {entry}, b: x}}\n')
    with pytest.raises(ValueError, match="`fishers` of 'a' must be a file, "): run_recipe(here/'r.yml', here/'out')

def test_a_recipe_with_another_result_fails_in_the_shell(here, capsys):
    average(here)
    text = (here/'out'/'recipe.yml').read_text()
    result = yaml.safe_load(text)['result']
    (here/'out'/'mine.yml').write_text(text.replace(result, 'f'*16))
    assert main(['merge', str(here/'out'/'mine.yml'), '--out', str(here/'again')]) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert len([o for o in said if 'the merged weights differ' in o]) == 1 and str(here/'again') in said[-1]
    assert Merged.from_pretrained(here/'again').recipe['result'] == result
    assert main(['merge', str(here/'out'/'recipe.yml'), '--out', str(here/'right')]) == 0


@pytest.mark.parametrize('out', ['a.csv', 'a/config.json'])
def test_a_measurement_does_not_replace_what_it_is_of(tmp_path, out, capsys):
    inputs(tmp_path)
    before = contents(tmp_path)
    assert main(['fisher', str(tmp_path/'a'), '--data', str(tmp_path/'a.csv'), '--out', str(tmp_path/out), '--overwrite']) == 2
    assert 'which is read; give another' in capsys.readouterr().err and contents(tmp_path) == before


# --- moving under us --------------------------------------------------------------------------

CHANGES = dict(
    rewritten=lambda f: f.write_bytes(f.read_bytes()),
    replaced=lambda f: (shutil.copy2(f, f.with_suffix('.new')), os.replace(f.with_suffix('.new'), f)),
    shortened=lambda f: os.truncate(f, f.stat().st_size-64))

@pytest.mark.parametrize('change', CHANGES)
@pytest.mark.parametrize('what', ['model', 'base', 'fisher'])
def test_a_source_that_is_written_meanwhile_is_named(tmp_path, monkeypatch, change, what):
    folders, fishers = big(tmp_path, 'fisher')
    file = dict(model=folders['t1']/'model.safetensors', base=tmp_path/'in'/'base'/'model.safetensors', fisher=fishers['t1'])[what]
    write, count = store.TensorSlot.__setitem__, [0]
    def meddle(self, rows, values):
        count[0] += 1
        if count[0] == 3: CHANGES[change](file)
        write(self, rows, values)
    monkeypatch.setattr(store.TensorSlot, '__setitem__', meddle)
    kw = dict(base=dict(base=tmp_path/'in'/'base', method='task-arithmetic'), fisher=dict(fishers=fishers, method='fisher')).get(what, dict(method='average'))
    with pytest.raises(ValueError, match=file.name): merge_files(folders, out=tmp_path/'out', threads=1, progress=False, **kw)
    assert not (tmp_path/'out').exists()

def test_a_mapped_model_that_was_cut_off_is_named(here, monkeypatch):
    "Without the check the process ends by SIGBUS."
    from fisher_nodes.merging import run
    load = run.load_inputs
    def and_cut(*args, **kw):
        found = load(*args, **kw)
        os.truncate(here/'b'/'model.safetensors', 3000)
        return found
    monkeypatch.setattr(run, 'load_inputs', and_cut)
    with pytest.raises(ValueError, match='b/model.safetensors was changed while it was being read'): merge(models(here), method='average', progress=False)


# --- one file, and what lies hidden beside it --------------------------------------------------

def cut_late(path, text='new'):
    "A writer that is killed when its file is there and the hidden one too."
    if not (pid := os.fork()):
        Path.unlink = lambda *args, **kw: os.kill(os.getpid(), signal.SIGKILL)
        with whole_file(path) as o: o.write_text(text)
    os.waitpid(pid, 0)

def test_a_file_that_nobody_was_told_of_may_be_replaced(here):
    from fisher_nodes.app.cli import check_file
    path = here/'o.json'
    cut_late(path)
    assert path.read_text() == 'new' and check_file(str(path), False) == path
    path.write_text('mine now, after the kill')
    with pytest.raises(OutputExistsError, match='give --overwrite'): check_file(str(path), False)
    assert hidden(here) == ['.o.json.lock']
    with whole_file(path) as o: o.write_text('again')
    assert not hidden(here) and path.read_text() == 'again'

def test_a_file_that_was_there_before_is_not_free(here):
    "The writer was killed before its own came in."
    path = here/'o.json'
    path.write_text('mine')
    if not (pid := os.fork()):
        os.replace = lambda *args: os.kill(os.getpid(), signal.SIGKILL)
        with whole_file(path) as o: o.write_text('new')
    os.waitpid(pid, 0)
    assert path.read_text() == 'mine' and files._state(here/'.o.json.lock')['done'] and not files.is_untold(path)

@pytest.mark.parametrize('make', [os.mkfifo, os.mkdir, lambda o: o.symlink_to('/dev/zero')], ids=['pipe', 'folder', 'link'])
def test_a_hidden_file_is_a_file(here, make):
    make(here/'.o.json.lock')
    with pytest.raises(OSError, match='.o.json.lock'), whole_file(here/'o.json') as o: o.write_text('new')
    assert not files.is_untold(here/'o.json') and not (here/'o.json').exists()

@pytest.mark.parametrize('name', ['../a/config.json', '/etc/passwd', '..', '.', '', 'a/../b', './x', 'a//b', 'x\n'])
def test_a_list_names_files_of_its_folder(here, name):
    (here/'r.json').write_text(json.dumps(dict(files={name: {}, 'a/b.json': {}})))
    assert files.read_list(here/'r.json') is None
    (here/'r.json').write_text(json.dumps(dict(files={'a/b.json': {}})))
    assert files.read_list(here/'r.json') == {'a/b.json': {}}
