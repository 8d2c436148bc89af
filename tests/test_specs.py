"""Rows and models by name, as every command takes them: columns, endings, folders, the home folder, revisions, the Hub."""
import gzip
import json
import os
import shutil

import datasets
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value
from hub import cached_data
from test_cli import WORDS, save_model

from fisher_nodes import Merged, evaluate, load_task, merge
from fisher_nodes.app.cli import main
from fisher_nodes.engine.models import as_reference, load_model, load_tokenizer
from fisher_nodes.engine.specs import named_rows
from fisher_nodes.merging.recipe import read_recipe

NAMES = ['class a', 'class b']
ROWS = [dict(review=' '.join(WORDS[4+(i*j) % 8] for j in range(1, 4+i % 5)), stars=i % 2) for i in range(24)]
FEATURES = Features(review=Value('string'), stars=ClassLabel(names=NAMES))
COMMIT = 'c'*40

def lines(sep, rows=ROWS): return ''.join(f'{sep.join(map(str, o))}\n' for o in (('review', 'stars'), *((o['review'], o['stars']) for o in rows)))

@pytest.fixture(scope='module')
def made(tmp_path_factory):
    d = tmp_path_factory.mktemp('specs')
    for i, k in enumerate('xy'): save_model(d/k, seed=i)
    (d/'rows.CSV').write_text(lines(','))
    (d/'Rows.Tsv.GZ').write_bytes(gzip.compress(lines('\t').encode()))
    (d/'rows.json').write_text(json.dumps(ROWS))
    (d/'rows.JSONL.gz').write_bytes(gzip.compress('\n'.join(map(json.dumps, ROWS)).encode()))
    whole = Dataset.from_list(ROWS, features=FEATURES)
    whole.to_parquet(str(d/'rows.PARQUET'))
    both = DatasetDict(train=whole, validation=whole.select(range(12)), test=whole.select(range(3, 9)))
    both.save_to_disk(str(d/'saved'))
    cached_data(d/'datasets', 'me/reviews', dict(both))
    for k in 'xy': # a repository in the cache, with a branch and a tag, of which only the tag is this model
        repo = d/'hub'/f'models--me--{k}'
        for ref, commit in (('main', '0'*40), ('v1', COMMIT)):
            (repo/'refs').mkdir(parents=True, exist_ok=True); (repo/'refs'/ref).write_text(commit)
        (repo/'snapshots').mkdir()
        shutil.copytree(d/k, repo/'snapshots'/COMMIT); shutil.copytree(d/('y' if k=='x' else 'x'), repo/'snapshots'/('0'*40))
    return d

@pytest.fixture(autouse=True)
def here(made, monkeypatch):
    import huggingface_hub.constants
    monkeypatch.chdir(made); monkeypatch.setenv('HOME', str(made))
    monkeypatch.setattr(datasets.config, 'HF_DATASETS_CACHE', made/'datasets')
    monkeypatch.setattr(huggingface_hub.constants, 'HF_HUB_CACHE', str(made/'hub'))
    return made

FILES = 'rows.CSV', 'Rows.Tsv.GZ', 'rows.json', 'rows.JSONL.gz', 'rows.PARQUET'
SPECS = *FILES, '~/rows.CSV', 'saved', 'saved/train', '~/saved', 'hub:me/reviews', 'hub:me/reviews:train', 'hub:me/reviews/default:train'
SCORED = {'saved': 12, 'saved/test': 6, 'hub:me/reviews': 12, 'hub:me/reviews:test': 6} # rows of what `evaluate` reads

@pytest.mark.parametrize('spec', SPECS)
def test_one_table_by_many_names(spec):
    rows, task = load_task(spec, text='review', label='stars')
    assert [dict(review=o['review'], stars=o['label']) for o in rows]==ROWS
    assert task.text==('review',) and (task.labels==tuple(NAMES) or spec in FILES or spec=='~/rows.CSV')

@pytest.mark.parametrize('spec', [*FILES, '~/saved', 'hub:me/reviews'])
def test_in_every_command(spec, tmp_path, capsys):
    "The same rows are trained on, measured, compared, scored and asked, whatever their name."
    named = f'--data x={spec} y={spec} --text review --label stars'
    def run(line):
        assert main([*line.split(), '--json'])==0, capsys.readouterr().err
        return json.loads(capsys.readouterr().out)
    assert run(f'finetune x --data {spec} --text review --label stars --epochs 1 --out {tmp_path}/new')['num_examples']==24
    run(f'merge x=x y=y {named} --out {tmp_path}/both')
    found = run(f'compare x=x y=y {named} --methods average,mask-fisher')
    assert all(o['held_out']+o['rows']<=24 for o in found['rows'].values()) and not found['left_out']
    assert set(run(f'evaluate {tmp_path}/both {named} --alone'))==set('xy')
    answers = run(f'predict {tmp_path}/both --data {spec} --text review')
    assert answers['texts']==[o['review'] for o in ROWS]
    want, got = merge(dict(x='x', y='y'), data={k: 'rows.json' for k in 'xy'}, text='review', label='stars'), Merged.from_pretrained(tmp_path/'both')
    assert {n: t.tolist() for n, t in got.body.state_dict().items()}=={n: t.tolist() for n, t in want.body.state_dict().items()}

@pytest.mark.parametrize('spec, n', SCORED.items())
def test_splits(spec, n, capsys):
    "`evaluate` reads the validation split, or the one that is named; each has rows of its own number."
    columns = '--text review --label stars --json'.split()
    def score(*line):
        assert main(['evaluate', 'x', *line, *columns])==0
        return next(iter(json.loads(capsys.readouterr().out).values()))['accuracy']
    rows, task = load_task(spec, 'validation', text='review', label='stars')
    assert len(rows)==n and score('--data', spec)==evaluate('x', rows, task)['accuracy']
    if n==12: assert score('--data', spec, '--split', 'test')==score('--data', f'{spec}:test' if spec.startswith('hub:') else f'{spec}/test')

def test_a_merge_of_saved_rows_and_of_the_hub_is_repeated(tmp_path, capsys):
    "Its recipe names folders as seen from there, and the Hub as it was named."
    assert main(f'merge x=x y=y --data x=~/saved y=hub:me/reviews@main:train --text review --label stars --out {tmp_path}/a'.split())==0
    data = read_recipe(tmp_path/'a'/'recipe.yml').data
    assert data==dict(x=str((tmp_path.home()/'saved').resolve()), y='hub:me/reviews@main:train')
    assert main(f'merge {tmp_path}/a/recipe.yml --out {tmp_path}/b'.split())==0
    assert (tmp_path/'a'/'model.safetensors').read_bytes()==(tmp_path/'b'/'model.safetensors').read_bytes()

def test_a_revision(here, tmp_path, capsys):
    "`id@revision` is what lies there and not on the main branch, wherever a model is named."
    assert as_reference('me/x@v1').revision=='v1' and as_reference('me/x').revision is None
    def same(a, b): return all((p==q).all() for p, q in zip(load_model(a).parameters(), load_model(b).parameters()))
    assert same('me/x@v1', 'x') and same('me/x', 'y') and not same('me/x@v1', 'y')
    assert load_model('me/x@v1').config._name_or_path=='me/x' and load_model('me/x@v1').config._commit_hash==COMMIT
    assert load_tokenizer('me/x@v1').get_vocab()==load_tokenizer('x').get_vocab()
    columns = '--text review --label stars'
    for line in (f'merge x=me/x@v1 y=me/y@v1 --method average --out {tmp_path}/m', f'compare x=me/x@v1 y=me/y@{COMMIT} --data x=rows.json y=rows.json {columns} --methods average',
                 f'evaluate me/x@v1 --data rows.json {columns}', 'predict me/x@v1 it', f'fisher me/x@v1 --data rows.json {columns} --out {tmp_path}/f.safetensors',
                 f'finetune me/x@v1 --data rows.json {columns} --epochs 1 --out {tmp_path}/t', 'describe me/x@v1'):
        assert main(line.split())==0, capsys.readouterr().err
    recipe = read_recipe(tmp_path/'m'/'recipe.yml')
    assert {t: (o.name, o.revision) for t, o in recipe.models.items()}==dict(x=('me/x', COMMIT), y=('me/y', COMMIT))
    body = Merged.from_pretrained(tmp_path/'m').body.state_dict()
    assert all((t==body[n]).all() for n, t in merge(dict(x='x', y='y'), method='average').body.state_dict().items())
    os.makedirs(tmp_path/'odd@name'); shutil.copytree(here/'x', tmp_path/'odd@name', dirs_exist_ok=True)
    assert same(tmp_path/'odd@name', 'x') # a folder is a folder

def test_home(capsys, tmp_path):
    assert load_task('~/rows.json', text='review', label='stars')[1].name=='rows'
    for line in (f'merge x=~/x y=~/y --method average --out {tmp_path}/m', 'evaluate ~/x --data ~/rows.json --text review --label stars'): assert main(line.split())==0
    assert load_model('~/x').config.num_labels==2 and named_rows('~/rows.json')[0].num_rows==24

@pytest.mark.parametrize('spec, say', [
    ('rows.xlsx', 'rows.xlsx: expected a file in .parquet'), ('x', 'x is a folder that `save_to_disk` did not write: expected a file in'), ('hub:', 'hub: names nothing on the Hub; expected hub:ID'),
    ('hub:me/none', "cannot read hub:me/none: Couldn't reach"), ('hub:me/reviews:nope', 'cannot read hub:me/reviews:nope: Unknown split "nope"'), ('none.csv', 'none.csv is not a file'), ('saved/nope', 'expected a file in')])
def test_wrong_names(spec, say, capsys, tmp_path):
    "One line that names what was given, before anything is written."
    columns = f'--text review --label stars --out {tmp_path}/out'
    for line in (f'finetune x --data {spec} {columns}', f'merge x=x y=y --data x={spec} y=rows.json {columns}'):
        assert main(line.split())==2
        err = capsys.readouterr().err.splitlines()
        assert len(err)==1 and (say in err[0] or 'merge' in line and 'expected glue:TASK, a file in' in err[0]), err
    assert not (tmp_path/'out').exists()

@pytest.mark.parametrize('columns, say', [('', "name that of the labels with label= (--label)|no column 'label'"), ('--label nope', "no column 'nope' among"), ('--label stars --text nope', "nope")])
def test_wrong_columns(columns, say, capsys):
    import re
    for spec in ('rows.json', 'saved', 'hub:me/reviews'):
        assert main(f'evaluate x --data {spec} {columns}'.split())==2
        err = capsys.readouterr().err.splitlines()
        assert len(err)==1 and re.search(say, err[0].replace('`', '')), err

def test_a_saved_folder_of_a_stranger(here, tmp_path, capsys):
    "No file elsewhere is read, and what is broken is named."
    for change, say in ((lambda d: (d/'state.json').write_text(json.dumps(json.loads((d/'state.json').read_text()) | dict(_data_files=[dict(filename='../secret.arrow')]))), 'names no files in the folder'),
                        (lambda d: ((d/'data-00000-of-00001.arrow').unlink(), os.symlink(here/'rows.json', d/'data-00000-of-00001.arrow')), 'data-00000-of-00001.arrow'),
                        (lambda d: (d/'data-00000-of-00001.arrow').write_bytes(b'x'), 'cannot be read'), (lambda d: (d/'state.json').write_text('['), 'state.json')):
        d = tmp_path/'strange'
        shutil.copytree(here/'saved'/'train', d)
        change(d)
        with pytest.raises(ValueError, match=say): load_task(d, text='review', label='stars')
        shutil.rmtree(d)

@pytest.mark.parametrize('name, say', [('me/x@nope', 'cannot load me/x at nope'), ('me/none@v1', 'cannot load me/none at v1')])
def test_wrong_revisions(name, say, capsys, tmp_path):
    for line in (f'evaluate {name} --data rows.json', f'merge x={name} y=y --method average --out {tmp_path}/out'):
        assert main(line.split())==2
        err = capsys.readouterr().err.splitlines()
        assert len(err)==1 and say in err[0], err
