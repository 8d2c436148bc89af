"""The command line as a shell user meets it: whole runs, one line for each mistake, models by Hub id from a local cache."""
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch.testing import assert_close
from transformers import (ArceeConfig, AutoModelForSequenceClassification, BertConfig, BertForSequenceClassification, MambaConfig,
                          Olmo2Config, PreTrainedTokenizerFast)

from fisher_nodes import MaskFisher, Merged, merge
from fisher_nodes.app.cli import COMMANDS, main, make_parser

WORDS = '[PAD] [UNK] [CLS] [SEP] it rains the sun shines on cats dogs'.split()

def save_model(folder, num_labels=2, seed=0, words=WORDS, **kw):
    torch.manual_seed(seed)
    names = {i: f'class {"abc"[i]}' for i in range(num_labels)}
    size = dict(vocab_size=len(words), hidden_size=16, num_hidden_layers=2, num_attention_heads=4, intermediate_size=24) | kw
    BertForSequenceClassification(BertConfig(**size, id2label=names, label2id={v: k for k, v in names.items()})).save_pretrained(folder)
    tok = Tokenizer(WordLevel({o: i for i, o in enumerate(words)}, unk_token='[UNK]'))
    tok.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tok, pad_token='[PAD]', unk_token='[UNK]', model_max_length=16).save_pretrained(folder)

def save_rows(path, labels):
    texts = [' '.join(WORDS[4+o % 8] for o in (i, i//8, *(i*j for j in range(1, 3+i % 4)))) for i in range(len(labels))] # no two alike
    path.write_text('text,label\n'+''.join(f'{t},{o}\n' for t, o in zip(texts, labels)))

@pytest.fixture(scope='module')
def here(tmp_path_factory):
    d = tmp_path_factory.mktemp('cli')
    save_model(d/'x'); save_model(d/'y', 3, seed=1)
    save_model(d/'wide', hidden_size=20); save_model(d/'words', words=WORDS[::-1])
    save_rows(d/'x.csv', [0, 1]*6); save_rows(d/'y.csv', [0, 1, 2]*4); save_rows(d/'bad.csv', [0, 1, 2, 1])
    save_rows(d/'named.csv', ['class b', 'class a']*4); save_rows(d/'strange.csv', ['good', 'bad'])
    size = dict(vocab_size=60, hidden_size=16, num_hidden_layers=2, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    wide = size | dict(num_attention_heads=4, intermediate_size=24)
    MambaConfig(**size).save_pretrained(d/'no_heads'); Olmo2Config(**wide).save_pretrained(d/'over_heads')
    ArceeConfig(**wide, num_key_value_heads=2).save_pretrained(d/'unknown')
    return d

@pytest.fixture(autouse=True)
def inside(here, monkeypatch): monkeypatch.chdir(here)

def run(line, capsys):
    status = main([*line.split(), '--json'])
    out = capsys.readouterr().out
    assert status==0, line
    return json.loads(out)

def test_whole_way(here, tmp_path, capsys):
    "Fishers to files, files to a merge, the merge to scores; each equals what Python gives."
    for k in 'xy': run(f'fisher {k} --data {k}.csv --num-samples 8 --out {tmp_path}/{k}.safetensors', capsys)
    said = run(f'merge x=x y=y --fisher x={tmp_path}/x.safetensors y={tmp_path}/y.safetensors --weights x=1 y=.5 --out {tmp_path}/m', capsys)
    assert list(said['tasks'])==['x', 'y'] and said['zero_fisher_nodes']==dict(heads=0, rows=0)
    models = {k: AutoModelForSequenceClassification.from_pretrained(here/k) for k in 'xy'}
    fishers = {k: MaskFisher.load(tmp_path/f'{k}.safetensors') for k in 'xy'}
    assert {k: (f.num_examples, f.meta['data'].split('/')[0], f.meta['model']) for k, f in fishers.items()}=={k: (8, f'{k}.csv', k) for k in 'xy'}
    want, got = merge(models, fishers, weights=[1, .5]), Merged.from_pretrained(tmp_path/'m')
    for n, t in want.body.state_dict().items(): assert_close(got.body.state_dict()[n], t, rtol=0, atol=0)
    scores = run(f'evaluate {tmp_path}/m --data x=x.csv y=y.csv --out {tmp_path}/scores.json', capsys)
    record = json.loads((tmp_path/'scores.json').read_text())
    assert set(scores)=={'x', 'y'} and record['scores']==scores and record['source']['tasks']['y']['weight']==.5
    assert {'versions', 'commit', 'date', 'machine'}<=set(record)

def test_best_and_heads(here, tmp_path, capsys):
    "The best merge says what it chose, and how often it answers as its models; layers wait in a folder."
    both = '--data x=x.csv y=y.csv --num-samples 12'
    said = run(f'merge x=x y=y {both} --method best --work {tmp_path}/work --out {tmp_path}/best', capsys)
    assert said['chosen'] == 'residual-regression' and '% of 1 row ' in said['answers_like_its_own_model']['y']
    assert len(list((tmp_path/'work').glob('fit.*.safetensors'))) == 3
    assert '## Does it answer as its models do?' in (tmp_path/'best'/'README.md').read_text()
    said = run(f'merge x=x y=y {both} --method average --refit-heads 1 --out {tmp_path}/heads', capsys)
    assert '% of 12 rows' in said['answers_like_its_own_model']['x'] and 'chosen' not in said
    plain = run(f'merge x=x y=y --method average --out {tmp_path}/plain', capsys)
    assert 'answers_like_its_own_model' not in plain
    a, b = (Merged.from_pretrained(tmp_path/o) for o in ('plain', 'heads'))
    for n, t in a.body.state_dict().items(): assert_close(b.body.state_dict()[n], t, rtol=0, atol=0)

def test_how_many_rows_were_measured_is_said(here, tmp_path, capsys):
    "In the table; and a warning where there were fewer than were asked for, not where none were asked for by number, or some were kept apart."
    rows = len((here/'x.csv').read_text().splitlines())-1
    (tmp_path/'few.csv').write_text('\n'.join((here/'y.csv').read_text().splitlines()[:4])+'\n')
    def told(more, y=here/'y.csv'):
        assert main(f'merge x=x y=y --data x={here}/x.csv y={y} {more} --overwrite --out {tmp_path}/m'.split())==0
        out, err = capsys.readouterr()
        shown = {o.split()[0]: o.split()[-1] for o in out.splitlines()[1:3]}
        return shown, [o for o in err.splitlines() if o.startswith('fisher-nodes')]
    assert told('--num-samples 4', tmp_path/'few.csv')==(dict(x='4', y='3'), ["fisher-nodes merge: --num-samples asks for 4 rows of a task; used were 3 of 'y'"])
    assert told('', tmp_path/'few.csv')==(dict(x=str(rows), y='3'), [])
    assert told(f'--num-samples {rows}')[1]==[]
    for k in 'xy': (tmp_path/f'{k}.csv').write_text('text,label\n'+''.join(f'{WORDS[4+i%4]} {WORDS[8+i//4]},{i%2}\n' for i in range(12)))
    apart = f'--data x={tmp_path}/x.csv y={tmp_path}/y.csv --method best --num-samples'
    assert told(f'{apart} 8')==(dict(x='7', y='7'), []) and "used were 12 of 'x', 12 of 'y'" in told(f'{apart} 13')[1][0], 'with those that were kept apart'

def test_a_merge_without_its_report_is_called_that(here, tmp_path, capsys):
    "Known by its recipe, or by the folders of the tasks that are named; a model with other folders inside is one model."
    m = tmp_path/'m'
    run(f'merge x=x y=y --method average --out {m}', capsys)
    (m/'merge_report.json').unlink()
    def told(line):
        assert main(line.split())==2
        said, = [o for o in capsys.readouterr().err.splitlines() if o.startswith('fisher-nodes')]
        return said
    both = f'evaluate {m} --data x=x.csv y=y.csv'
    for line in (both, f'evaluate {m} --data x.csv', f'predict {m} word'): assert 'm has no merge_report.json, though it looks like a merge (it has recipe.yml' in told(line)
    (m/'recipe.yml').unlink()
    assert 'it has x, y); put the file back, or merge again' in told(both)
    assert 'is one model, so give one data set, not 2' in told(f'evaluate {m} --data x.csv y.csv')

def test_rows_without_labels(here, tmp_path, capsys):
    "Methods that read no labels take files without them, and files whose labels mean nothing; to the same numbers."
    for k in 'xy':
        text = [o.rpartition(',')[0] for o in (here/f'{k}.csv').read_text().splitlines()]
        (tmp_path/f'bare-{k}.csv').write_text('\n'.join(text)+'\n')
        (tmp_path/f'odd-{k}.csv').write_text('text,label\n'+''.join(f'{o},what?\n' for o in text[1:]))
    for method in ('best', 'regmean', 'mask-fisher --labels exact'):
        found = []
        for kind in (f'{here}/', f'{tmp_path}/bare-', f'{tmp_path}/odd-'):
            out = tmp_path/f'{method.split()[0]}{len(found)}'
            run(f'merge x=x y=y --data x={kind}x.csv y={kind}y.csv --num-samples 12 --method {method} --out {out}', capsys)
            found.append(Merged.from_pretrained(out)['y'].state_dict())
        for o in found[1:]:
            for n, t in found[0].items(): assert_close(o[n], t, rtol=0, atol=0)
    assert main(f'merge x=x y=y --data x={tmp_path}/bare-x.csv y={tmp_path}/bare-y.csv --out {tmp_path}/no'.split()) == 2
    assert "no column 'label' among ['text']" in capsys.readouterr().err

@pytest.mark.parametrize('line, said', [
    ('--method average --refit-heads .5', "needs either `--fisher` or `--data`|--data|without"), ('--method average --work w', "--work keeps the layers that a method fits; 'average' fits none"),
    ('--method best --work w', "'best' fits none without --data"),
    ('--method best --data x=x.csv y=y.csv --refit-heads 2', "from 0 to 1, got '2'"), ('--method best --data x=x.csv y=y.csv --work out', '--work and --out are one folder'), ('--method best --data x=x.csv y=y.csv --work x', "is, holds or lies in the model of 'x'"),
    ('--method best --refit-heads .5', '--refit-heads says how to measure, but without --data nothing is measured'),
    ('--method best --data x=x.csv y=y.csv --num-samples 1', "'x' has one row, so that none can be kept apart")])
def test_best_and_heads_asked_wrongly(line, said, tmp_path, capsys):
    try: status = main(f'merge x=x y=y {line} --out out'.split())
    except SystemExit as e: status = e.code
    err = capsys.readouterr().err
    assert status == 2 and re.search(said, err), err
    assert not Path('out').exists()

def test_data_or_files_the_same(tmp_path, capsys):
    for k in 'xy': run(f'fisher {k} --data {k}.csv --num-samples 5 --seed 3 --out {tmp_path}/{k}.safetensors', capsys)
    run(f'merge x=x y=y --fisher x={tmp_path}/x.safetensors y={tmp_path}/y.safetensors --out {tmp_path}/a', capsys)
    run(f'merge x=x y=y --data x=x.csv y=y.csv --num-samples 5 --seed 3 --out {tmp_path}/b', capsys)
    a, b = (Merged.from_pretrained(tmp_path/o).body.state_dict() for o in 'ab')
    for n in a: assert_close(a[n], b[n], rtol=0, atol=0)

def test_average_needs_no_data(tmp_path, capsys):
    run(f'merge x=x y=y --method average --out {tmp_path}/m', capsys)
    assert {o.suffix for o in (tmp_path/'m').rglob('*') if o.is_file()}=={'.json', '.md', '.safetensors', '.yml'}
    run(f'evaluate {tmp_path}/m/y --data y.csv', capsys)

def test_label_words_mean_what_the_model_means(tmp_path, capsys):
    "Sorted, 'class a' comes first anyway; the model's own order decides, and unknown words are refused."
    a = run(f'fisher x --data named.csv --out {tmp_path}/a.safetensors', capsys)
    assert a['num_examples']==8

def test_finetune(tmp_path, capsys):
    said = run(f'finetune x --data y.csv --validation y.csv --epochs 1 --batch-size 4 --out {tmp_path}/new', capsys)
    assert said['num_examples']==12 and 'accuracy' in said['scores']
    assert AutoModelForSequenceClassification.from_pretrained(tmp_path/'new').config.num_labels==3

def test_validation_rows_keep_the_meaning_of_labels(tmp_path, capsys):
    "A validation file without one of the classes must not shift the others."
    texts = ['it rains', 'the sun shines', 'cats on dogs']
    for name, words in (('train', 'abc'*8), ('valid', 'bc'*4)):
        (tmp_path/f'{name}.csv').write_text('text,label\n'+''.join(f'{texts["abc".index(w)]},{w}\n' for w in words))
    said = run(f'finetune x --data {tmp_path}/train.csv --validation {tmp_path}/valid.csv --epochs 20 --learning-rate 1e-2 --batch-size 8 --out {tmp_path}/m', capsys)
    assert said['scores']==run(f'evaluate {tmp_path}/m --data {tmp_path}/valid.csv', capsys)['valid.csv']==dict(accuracy=1.)

def test_no_paths_in_what_is_passed_on(here, tmp_path, capsys):
    "Files that people share say what a model and its data are called, not where they were."
    for k in 'xy': run(f'fisher {here}/{k} --data {here}/{k}.csv --out {tmp_path}/{k}.safetensors', capsys)
    run(f'merge x={here}/x y={here}/y --fisher x={tmp_path}/x.safetensors y={tmp_path}/y.safetensors --out {tmp_path}/m', capsys)
    run(f'evaluate {tmp_path}/m --data x={here}/x.csv y={here}/y.csv --out {tmp_path}/s.json', capsys)
    for f in [*tmp_path.rglob('*.json'), *tmp_path.rglob('*.md'), *tmp_path.glob('*.safetensors')]:
        assert str(here).encode() not in f.read_bytes() and str(tmp_path).encode() not in f.read_bytes(), f

MISTAKES = {
    'merge x=x x=y --method average --out {o}': "task 'x' is given twice",
    'merge x=x y=wide --method average --out {o}': "hidden_size is 16 in 'x' but 20 in 'y'",
    'merge x=x y=words --method average --out {o}': 'the tokenizers of x and words differ',
    'merge x=x y=y --out {o}': 'needs either --fisher or --data',
    'merge x=x y=y --method soup --out {o}': 'expected one of',
    'merge x=x y=y --data x=x.csv --out {o}': "--data names ['x'], but the models are ['x', 'y']",
    'merge x=x y=y --data x=x.csv y=y.csv --weights x=1 y=one --out {o}': '--weights: could not convert',
    'merge x=x y=y --method average --out x': 'is not empty',
    'merge x=nowhere y=y --method average --out {o}': 'cannot load nowhere',
    'fisher nowhere --data x.csv --out {o}': 'cannot load nowhere',
    'finetune nowhere --data x.csv --out {o}': 'cannot load nowhere',
    'fisher x --data bad.csv --out {o}': 'bad.csv: row 2 has label 2, expected 0 to 1',
    'fisher x --data strange.csv --out {o}': "'bad' is not among ['class a', 'class b']",
    'fisher x --data x.csv --num-samples 0 --out {o}': "--num-samples: expected a whole number of at least 1, got '0'",
    'finetune x --data x.csv --epochs nan --out {o}': "--epochs: expected a number above 0, got 'nan'",
    'describe nowhere': 'cannot load nowhere',
    'describe no_heads': 'no heads and no neurons were found',
    'describe over_heads': 'has matrices inside layers without a place: layers.{}.self_attn: q_proj, k_proj, v_proj and o_proj',
    'bench x --data x.csv --rounds 0 --out {o}': "--rounds: expected a whole number of at least 1, got '0'",
    'merge x=x y=y --method average --num-samples 8 --out {o}': '--num-samples says how to measure, but without --data',
    'merge x=x y=y --method average --precision bf16 --out {o}': '--precision says how to measure',
    'merge x=x y=y --method average --accept-changes --out {o}': '--accept-changes is about a recipe',
    'merge x=nowhere X=x --method average --out {o}': 'differ in capitals only',
    'merge x=nowhere y=x --method ties --base x --options density=0 --out {o}': '`density` is 0',
    'merge x=x y=y --method average --over --out {o}': 'unrecognized arguments: --over',
    'merge x=x y=y --method average --max-shard-size abc --out {o}': "--max-shard-size is 'abc'",
    'evaluate x --data x.csv --split test': '--split is about glue:TASK',
    'fisher x --data nowhere.csv --out {o}': 'nowhere.csv',
    'fisher x --data glue:nope --out {o}': 'nope',
    'fisher x --data x.csv --device tpu9 --out {o}': "no device 'tpu9'",
    'fisher x --data x.csv --out x/config.json': 'exists; give --overwrite',
    'evaluate x --data x.csv y.csv': 'x is one model',
    'evaluate x --data y.csv': 'label',
    'finetune x --data x.csv --out y': 'is not empty',
}

@pytest.mark.parametrize('line, say', MISTAKES.items())
def test_mistakes(line, say, tmp_path, capsys):
    "Exit status 2, one line that names what is wrong, and nothing written."
    before = sorted(Path('.').rglob('*'))
    try: status = main(line.format(o=tmp_path/'new').split())
    except SystemExit as e: status = e.code
    assert status==2
    text = [o for o in capsys.readouterr().err.splitlines() if o.startswith('fisher-nodes')]
    assert len(text)==1 and say in text[0]
    assert not (tmp_path/'new').exists() and sorted(Path('.').rglob('*'))==before

@pytest.mark.parametrize('command', COMMANDS)
def test_help_shows_an_example(command, capsys):
    with pytest.raises(SystemExit) as e: main([command, '--help'])
    assert e.value.code==0 and f'fisher-nodes {command}' in capsys.readouterr().out.split('example:')[1]

def test_models_by_hub_id(here, tmp_path):
    "In a process of its own, offline, from a cache in the layout that huggingface_hub keeps."
    for k in 'xy':
        repo = tmp_path/'hub'/f'models--some--{k}'
        (repo/'refs').mkdir(parents=True); (repo/'refs'/'main').write_text('0'*40)
        (repo/'snapshots').mkdir(); os.symlink(here/k, repo/'snapshots'/('0'*40))
    env = os.environ | dict(HF_HOME=str(tmp_path), HF_HUB_OFFLINE='1')
    code = 'import sys; from fisher_nodes.app.cli import main, make_parser; sys.exit(main())'
    line = f'merge x=some/x y=some/y --data x=x.csv y=y.csv --num-samples 4 --out {tmp_path}/m'
    done = subprocess.run([sys.executable, '-c', code, *line.split()], env=env, capture_output=True, text=True, cwd=here)
    assert done.returncode==0, done.stderr
    report = json.loads((tmp_path/'m'/'merge_report.json').read_text())
    assert {k: o['model'] for k, o in report['tasks'].items()}==dict(x='some/x', y='some/y')
    done = subprocess.run([sys.executable, '-c', code, *line.replace('some/y', 'some/z').replace('/m', '/n').split()], env=env, capture_output=True, text=True, cwd=here)
    assert done.returncode==2 and 'some/z' in done.stderr and not (tmp_path/'n').exists()

def test_tables_are_plain_in_a_pipe(tmp_path, capsys):
    assert main(f'merge x=x y=y --method average --out {tmp_path}/{"long"*50}'.split())==0
    out = capsys.readouterr().out
    assert f'wrote: {tmp_path}/{"long"*50}' in out.splitlines() and '\x1b' not in out
    assert main('evaluate x --data x.csv'.split())==0
    lines = [o.split() for o in capsys.readouterr().out.splitlines() if o.strip()]
    assert lines[0]==['accuracy', 'rows'] and lines[-1][0]=='x.csv' and 0<=float(lines[-1][1])<=1

def test_help_is_a_tour(capsys):
    with pytest.raises(SystemExit): main(['--help'])
    out = capsys.readouterr().out
    for line in (o.strip() for o in out.splitlines() if o.strip().startswith('fisher-nodes ') and '--help' not in o): make_parser().parse_args(line.split()[1:])
    assert out.count('  fisher-nodes ')>4

def test_a_recipe_repeats_a_merge(tmp_path, capsys):
    run(f'merge x=x y=y --data x=x.csv y=y.csv --num-samples 5 --weights x=1 y=.5 --out {tmp_path}/a', capsys)
    said = run(f'merge {tmp_path}/a/recipe.yml --out {tmp_path}/b', capsys)
    assert set(said['tasks'])=={'x', 'y'} and said['tasks']['y']['λ']==.5
    for name in ('model.safetensors', 'recipe.yml'): assert (tmp_path/'a'/name).read_bytes()==(tmp_path/'b'/name).read_bytes()
    for line, say in ((f'merge {tmp_path}/a/recipe.yml --seed 0 --out {tmp_path}/c', '--seed is for the recipe to say'),
                      (f'merge {tmp_path}/a/config.json --out {tmp_path}/c', 'no key'), (f'merge {tmp_path}/none.yml --out {tmp_path}/c', 'is not a file')):
        assert main(line.split())==2
        err = capsys.readouterr().err.splitlines()
        assert len(err)==1 and say in err[0], err
    assert not (tmp_path/'c').exists()

def test_describe_needs_only_a_config(capsys):
    "The picture, the row to put into the table, and a proof; the model has no weights on disk."
    assert main('describe unknown --check'.split())==0
    out = capsys.readouterr().out
    assert '2 × head  layers.{}.self_attn: 4 heads of 4, 2 key heads; q q_proj' in out and 'proved: the row found' in out
    said = run('describe unknown', capsys)
    from fisher_nodes.core.families import FFN, Attention, Family # noqa: F401 - what the row is written in
    rows = {}
    exec(said['row'], dict(FAMILIES=rows, Family=Family, Attention=Attention, FFN=FFN))
    assert [type(o).__name__ for o in rows['arcee'].blocks]==['Attention', 'FFN']
    assert said['blocks']['layers.1.self_attn']==dict(head=4, group=2) and len(said['plain'])==6
    assert run('describe x --check', capsys)['proved']=='the row of the table'
