"""What a user must be told of models and rows: pairs and single texts, foreign starts, rows that were learned, names in records."""
import json
import re
import warnings

import pytest
import torch
from test_cli import WORDS, save_model
from transformers import AutoModelForSequenceClassification

from fisher_nodes import merge
from fisher_nodes.app.cli import main
from fisher_nodes.core import start
from fisher_nodes.core.start import BaseDiffers, StartsDiffer
from fisher_nodes.engine.fingerprints import hash_keys

def texts(n, shift): return [' '.join(WORDS[4+(i*j+shift) % 8] for j in range(1, 4+i % 5)) for i in range(n)]

@pytest.fixture(scope='module')
def here(tmp_path_factory):
    d = tmp_path_factory.mktemp('told')
    save_model(d/'start', num_hidden_layers=3)
    (d/'pairs.csv').write_text('premise,hypothesis,label\n'+''.join(f'{a},{b},{i % 2}\n' for i, (a, b) in enumerate(zip(texts(24, 0), texts(24, 3)))))
    for k, shift in (('single', 1), ('other', 5)): (d/f'{k}.csv').write_text('text,label\n'+''.join(f'{t},{i % 2}\n' for i, t in enumerate(texts(24, shift))))
    for k, data in (('pair', 'pairs'), ('one', 'single'), ('two', 'other')):
        assert main(f'finetune {d}/start --data {d}/{data}.csv --epochs 1 --out {d}/{k}'.split())==0
    return d

@pytest.fixture(autouse=True)
def inside(here, monkeypatch): monkeypatch.chdir(here)

def fails(line, capsys):
    capsys.readouterr()
    assert main(line.split())==2, line
    err = capsys.readouterr().err.splitlines()
    assert len(err)==1, err
    return err[0]

@pytest.mark.parametrize('line', ['evaluate pair --data single.csv', 'fisher pair --data single.csv --out f.safetensors', 'compare a=pair b=one --data a=single.csv b=single.csv',
                                  'merge a=pair b=one --data a=single.csv b=single.csv --out m', 'merge a=pair b=one --data a=single.csv b=single.csv --method best --out m',
                                  'predict pair it', 'evaluate pair --data single.csv --text text'])
def test_pairs_are_not_scored_on_single_texts(line, capsys, here):
    "Nor measured, nor asked: the same words everywhere, and nothing is written."
    assert re.search(r'the model was fine-tuned on pairs of texts \(premise, hypothesis\), and these are single texts \(text\)', fails(line, capsys))
    assert not (here/'m').exists() and not (here/'f.safetensors').exists()

def test_nor_single_texts_on_pairs(capsys):
    assert 'fine-tuned on single texts (text), and these are pairs of texts (premise, hypothesis)' in fails('evaluate one --data pairs.csv', capsys)
    assert main('evaluate one --data pairs.csv --text premise'.split())==0 # one of two, by name
    assert main('evaluate pair --data pairs.csv'.split())==0

def test_a_pair_model_learns_single_texts(here, tmp_path, capsys):
    "What a start was trained on says nothing of what is trained next."
    assert main(f'finetune pair --data single.csv --epochs 1 --out {tmp_path}/next'.split())==0
    assert main(f'evaluate {tmp_path}/next --data single.csv'.split())==0

def test_rows_that_were_learned(here, capsys, tmp_path):
    "Told of the file a model was fine-tuned on, in any order and under any name; not of other rows."
    lines = (here/'single.csv').read_text().splitlines()
    (tmp_path/'copy.csv').write_text('\n'.join([lines[0], *lines[:0:-1]])+'\n')
    def said(*line):
        assert main(['compare', *' '.join(line).split(), '--methods', 'average', '--num-samples', '8'])==0
        return ' '.join(capsys.readouterr().out.split())
    known = 'the own models of {} were fine-tuned on these rows'.format
    assert known('one, two') in said('one=one two=two --data one=single.csv two=other.csv')
    found = said(f'one=one two=two --data one={tmp_path}/copy.csv two=single.csv')
    assert known('one') in found and known('one, two') not in found
    assert 'fine-tuned on these rows' not in said('one=one two=two --data one=other.csv two=single.csv')
    assert known('one') in said('one=one two=two --data one=other.csv two=other.csv --held-out one=single.csv two=single.csv')
    assert json.loads((here/'one'/'finetune.json').read_text())['rows_hash']!=hash_keys([])

def test_a_file_has_no_split(tmp_path, capsys):
    for name in ('single', 'other'):
        assert main(f'evaluate one --data {name}.csv --out {tmp_path}/{name}.json'.split())==0
        found = json.loads((tmp_path/f'{name}.json').read_text())
        assert found['split']=={} and found['data'][f'{name}.csv'].startswith(f'{name}.csv#') and 'validation' not in json.dumps(found['data'])

def foreign(folder, start, layers):
    "A model of which some layers are another's."
    model, other = (AutoModelForSequenceClassification.from_pretrained(o) for o in start)
    for i in layers: model.bert.encoder.layer[i].load_state_dict(other.bert.encoder.layer[i].state_dict())
    model.save_pretrained(folder)
    return folder

@pytest.mark.parametrize('layers, say', [((), None), ((1,), r'of 0\.\d+, but in encoder.layer.1 of -?0\.\d+, where'), ((0, 1, 2), r'a cosine of -?0\.\d+, where')])
def test_a_part_that_is_foreign(here, tmp_path, monkeypatch, layers, say):
    "One foreign layer is named, all foreign layers are one number; and the card says the same."
    monkeypatch.setattr(start, 'ENOUGH', 100)
    save_model(tmp_path/'far', seed=9, num_hidden_layers=3)
    if layers:
        with pytest.warns(StartsDiffer, match=say): merged = merge(dict(a=here/'start', b=foreign(tmp_path/'x', (here/'start', tmp_path/'far'), layers)), method='average')
    else:
        with warnings.catch_warnings():
            warnings.simplefilter('error', StartsDiffer)
            merged = merge(dict(a=here/'start', b=here/'one'), method='average')
    merged.save_pretrained(tmp_path/'m')
    card = (tmp_path/'m'/'README.md').read_text()
    assert ('of one start have more than' in card)==bool(layers) and ('encoder.layer.1' in card)==(layers==(1,))
    found = merged.report['alike'][0]
    slow = [torch.cat([p.flatten() for n, p in AutoModelForSequenceClassification.from_pretrained(o).bert.encoder.layer[1].named_parameters() if p.ndim==2]).double()
            for o in (here/'start', tmp_path/'x' if layers else here/'one')]
    if layers==(1,): torch.testing.assert_close(found['of_layer'], (slow[0]@slow[1]/slow[0].norm()/slow[1].norm()).item(), rtol=1e-6, atol=0)

def test_told_once_by_compare(here, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(start, 'ENOUGH', 100)
    save_model(tmp_path/'far', seed=9, num_hidden_layers=3)
    assert main(f'compare a=start b={tmp_path}/far --data a=single.csv b=other.csv --methods average,regmean,mask-fisher,best'.split())==0
    assert capsys.readouterr().err.count('were they?')==1

def further(folder, start, size, seed):
    "A model that was moved."
    model = AutoModelForSequenceClassification.from_pretrained(start)
    torch.manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters(): p += size*torch.randn_like(p)
    model.save_pretrained(folder)
    return folder

def test_a_base_that_is_none(here, tmp_path, monkeypatch, capsys):
    "One model that began at the other, and a base of another start, are told with their names; in memory, from files, and once by compare."
    monkeypatch.setattr(start, 'ENOUGH', 100)
    save_model(tmp_path/'far', seed=9, num_hidden_layers=3)
    own, first = (further(tmp_path/o, here/'start', .01, i) for i, o in enumerate(('own', 'first')))
    second = further(tmp_path/'second', first, .002, 5)
    def told(models, base):
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter('always')
            merge(models, method='task-arithmetic', base=base, weights=dict.fromkeys(models, .3))
        return [str(o.message) for o in said if o.category is BaseDiffers]
    assert told(dict(a=own, b=first), here/'start')==[]
    said, = told(dict(a=own, b=first, c=second), here/'start')
    assert re.match(r"what fine-tuning changed in 'b' and 'c' has a cosine of 0\.9\d, where", said)
    said, = told(dict(a=own, b=first), tmp_path/'far')
    assert re.match(r"the weights of '[ab]' and `base` have a cosine of -?0\.0\d+, where", said)
    said, = told(dict(a=own, b=first), own)
    assert said=="'a' has the weights of `base`, so that it changes nothing; was it fine-tuned from it?"
    assert main(f'merge b={first} c={second} --base start --method ties --out {tmp_path}/m'.split())==0
    assert capsys.readouterr().err.count('or did one begin at the other?')==1
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter('always')
        merge(dict(b=first, c=second), method='average')
    assert not said
    for o in (first, second): (o/'tokenizer.json').write_bytes((here/'one'/'tokenizer.json').read_bytes())
    assert main(f'compare b={first} c={second} --base start --data b=single.csv c=other.csv --methods average,ties,dare,task-arithmetic'.split())==0
    assert capsys.readouterr().err.count('or did one begin at the other?')==1

def test_which_rows_a_winner_measured(here, tmp_path, capsys):
    "Rows of a split have no name: recipe, card and screen say which they were, and how to have them again; where none were measured the recipe is whole."
    line = 'compare a=one b=two --data a=single.csv b=other.csv --num-samples 8 --share .25 --seed 3 --save'
    assert main([*line.split(), f'{tmp_path}/rows', '--methods', 'regmean'])==0
    assert 'repeat: by this command; rows of a split have no name for a recipe' in capsys.readouterr().out
    want = r'rows of single.csv, without \d+ held out \(0.25 of its rows, drawn by seed 3\); `fisher-nodes compare` on the same files draws them again'
    recipe, card = ((tmp_path/'rows'/o).read_text() for o in ('recipe.yml', 'README.md'))
    assert re.search(fr'(?m)^# a: \d+ {want}$', recipe) and 'a: null' in recipe and re.search(r'rows of single.csv, without \d+ held out', card.replace('\\', ''))
    said = fails(f'merge {tmp_path}/rows/recipe.yml --out {tmp_path}/again', capsys)
    assert "no name for `data` of 'a'" in said
    assert main([*line.split(), f'{tmp_path}/plain', '--methods', 'average'])==0
    assert 'repeat:' not in capsys.readouterr().out and main(f'merge {tmp_path}/plain/recipe.yml --out {tmp_path}/again'.split())==0

def test_the_card_says_that_the_folder_is_a_body(here, tmp_path):
    merge(dict(a=here/'one', b=here/'two'), method='average').save_pretrained(tmp_path/'m')
    assert 'a `pipeline` of it would make one at random' in ' '.join((tmp_path/'m'/'README.md').read_text().split())
