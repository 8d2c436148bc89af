"""Comparing merges: no held-out row is measured on, the numbers are those of each merge scored alone, the winner's folder is that merge to the bit."""
import json
import random
import shutil
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from huggingface_hub import ModelCard
from test_predict import WORDS, make, words
from torch.testing import assert_close

import fisher_nodes.experiment.compare as comparing
from fisher_nodes import METHODS, Merged, evaluate, merge
from fisher_nodes.app.cli import main
from fisher_nodes.experiment.compare import OWN_MODELS as OWN
from fisher_nodes.experiment.compare import Comparison, compare

COUNTS = dict(x=2, y=3)

def texts(n, seed):
    "Different texts of words that the tokenizer knows."
    r, found = random.Random(seed), {}
    while len(found) < n: found[' '.join(r.choices(WORDS[4:12], k=r.randint(5, 9)))] = None
    return list(found)

def save_rows(path, rows, classes, seed=0):
    r = random.Random(f'labels {seed}')
    path.write_text('text,label\n'+''.join(f'{o},{r.randrange(classes)}\n' for o in rows))

@pytest.fixture(scope='module')
def made(tmp_path_factory):
    d = tmp_path_factory.mktemp('compare')
    for i, (t, n) in enumerate(COUNTS.items()):
        make('bert', n, i).save_pretrained(d/t); words().save_pretrained(d/t)
        save_rows(d/f'{t}.csv', texts(40, t), n)
        save_rows(d/f'held-{t}.csv', texts(25, f'held {t}'), n, 1)
    make('bert', 2, 9).save_pretrained(d/'base'); words().save_pretrained(d/'base')
    return d

@pytest.fixture
def here(made, tmp_path, monkeypatch):
    "A copy, in which commands run."
    shutil.copytree(made, tmp_path/'in')
    monkeypatch.chdir(tmp_path/'in')
    return tmp_path/'in'

def run(line, capsys):
    assert main([*line.split(), '--json']) == 0, capsys.readouterr().err
    out, err = capsys.readouterr()
    run.err = [o for o in err.splitlines() if o.startswith('fisher-nodes')]
    return json.loads(out)

def weights(folder): return {o.relative_to(folder).as_posix(): o.read_bytes() for o in Path(folder).rglob('*.safetensors')}

BOTH, HELD = 'x=x y=y --data x=x.csv y=y.csv', '--held-out x=held-x.csv y=held-y.csv'

def test_as_each_merge_alone(here, capsys):
    "Every method by its own commands: the same scores; the winner's folder has the same weights, byte for byte."
    said = run(f'compare {BOTH} {HELD} --num-samples 16 --save won --out table', capsys)
    tried = [m for m in said['scores'] if m != OWN]
    assert set(tried) == {m for m, o in METHODS.items() if not o.needs_base} and set(said['left_out']) == set(METHODS)-set(tried)
    for m in tried:
        data = '--data x=x.csv y=y.csv --num-samples 16' if METHODS[m].statistic else ''
        run(f'merge x=x y=y --method {m} {data} --out alone/{m}', capsys)
        found = run(f'evaluate alone/{m} --alone --data x=held-x.csv y=held-y.csv', capsys)
        assert said['scores'][m] == {t: o['accuracy'] for t, o in found.items()}, m
    for t in COUNTS: assert said['scores'][OWN][t] == run(f'evaluate {t} --data held-{t}.csv', capsys)[f'held-{t}.csv']['accuracy']
    own = said['scores'][OWN]
    def losses(m): return [said['scores'][m][t]-own[t] for t in own]
    assert said['winner'] == max(tried, key=lambda m: (min(losses(m)), sum(losses(m))))
    assert weights('won') == weights(f'alone/{said["winner"]}') and len(weights('won')) == 5
    assert set(said['seconds']) == set(tried) and all(0 < o < 600 for o in said['seconds'].values())
    record = json.loads(Path('table/compare.json').read_text())
    assert {k: record[k] for k in ('scores', 'winner', 'rows')} == {k: said[k] for k in ('scores', 'winner', 'rows')}
    assert (here/'table'/'compare.png').read_bytes().endswith(b'IEND\xaeB`\x82') and said['winner'] in (here/'table'/'compare.md').read_text()
    assert set(run('merge won/recipe.yml --out again', capsys)['tasks']) == {'x', 'y'} and weights('again') == weights('won') # the recipe names all

def test_a_winner_says_how_it_won(here, capsys):
    said = run(f'compare {BOTH} --num-samples 8 --methods average,mask-fisher --save won', capsys)
    report, card = json.loads(Path('won/merge_report.json').read_text()), ModelCard.load('won/README.md')
    assert report['won']['why'] == said['why'] and set(report['won']['points']) == {'average', 'mask-fisher'}
    assert said['why'] in ' '.join(card.text.split()) and 'its worst task loses least' in said['why']
    assert {o.dataset_name: o.metric_value for o in card.data.eval_results} == said['scores'][said['winner']]
    Merged.from_pretrained('won').predict(['it rains'])

def spied(monkeypatch):
    "What is measured on, and what is scored on, by task: the texts."
    measured, scored = {}, {}
    real, score = comparing.merge, comparing.evaluate
    def spy(models, **kw):
        for t, rows in (kw.get('data') or {}).items(): measured.setdefault(t, set()).update(rows['text'][:])
        return real(models, **kw)
    def spy_score(model, rows, *args, **kw):
        scored.setdefault(model.config.num_labels, set()).update(rows['text'][:])
        return score(model, rows, *args, **kw)
    monkeypatch.setattr(comparing, 'merge', spy)
    monkeypatch.setattr(comparing, 'evaluate', spy_score)
    return measured, scored

@pytest.mark.parametrize('seed', range(4))
def test_no_row_on_both_sides(here, monkeypatch, seed):
    "Also where texts stand twice in a file, and where tasks share some of them."
    common = texts(30, 'common')
    save_rows(here/'x.csv', common+texts(20, 'x only')+common[:9], 2)
    save_rows(here/'y.csv', texts(40, 'y only')+common[5:25], 3)
    measured, scored = spied(monkeypatch)
    found = compare(dict(x='x', y='y'), dict(x='x.csv', y='y.csv'), methods=['mask-fisher'], share=.3, seed=seed, num_samples=None, progress=False)
    assert not set.union(*measured.values()) & set.union(*scored.values())
    assert len(scored[2]) == 15 and len(scored[3]) == 18 # of 50 and 60 different texts
    all_x = set(common+texts(20, 'x only'))
    assert measured['x']|scored[2] <= all_x and len(all_x-measured['x']-scored[2]) == len(scored[3]&set(common)-scored[2])
    assert found.rows['x']['held_out'] >= 15

def test_the_split_is_by_share_and_seed(here, monkeypatch):
    def held(**kw):
        _, scored = spied(monkeypatch)
        found = compare(dict(x='x', y='y'), dict(x='x.csv', y='y.csv'), methods=['average'], progress=False, **kw)
        assert found.settings['seed'] == kw.get('seed', 0) and 'seed' in str(found)
        monkeypatch.undo(), monkeypatch.chdir(here)
        return scored[2]
    assert held() == held() and len(held()) == 8 and len(held(share=.5)) == 20 and held(seed=1) != held() and len(held(limit=3)) == 3
    assert held() < held(share=.5) # more rows, and no other ones

def test_rows_in_both_are_refused(here, capsys):
    "By count and first row; also where it is another task that measures on them."
    own = (here/'x.csv').read_text().splitlines()[1:]
    held = (here/'held-x.csv').read_text().splitlines()
    (here/'mixed.csv').write_text('\n'.join([*held[:4], own[7], *held[4:9], own[0].rpartition(',')[0]+',1', own[7]])+'\n')
    before = sorted(here.rglob('*'))
    for data in ('x=x.csv y=y.csv', 'x=y.csv y=x.csv'):
        assert main(f'compare x=x y=y --data {data} --held-out x=mixed.csv y=held-y.csv --save won --out table'.split()) == 2
        said = [o for o in capsys.readouterr().err.splitlines() if o.startswith('fisher-nodes')]
        task = data[data.index('=x.csv')-1]
        assert len(said) == 1 and f"held-out rows of 'x': 3 of 11 stand in the data of '{task}' too, the first is row 3" in said[0], said
    assert sorted(here.rglob('*')) == before

def test_glue_is_scored_on_its_validation_rows(here, monkeypatch, capsys):
    "Without those that stand in the training rows, which is said."
    import pyarrow as pa
    import pyarrow.parquet as pq
    (here/'glue'/'sst2').mkdir(parents=True)
    train, valid = texts(30, 'train'), texts(12, 'valid')
    for split, rows in (('train', train), ('validation', [*valid[:5], train[3], *valid[5:]])):
        pq.write_table(pa.table(dict(sentence=rows, label=[i % 2 for i in range(len(rows))])), here/'glue'/'sst2'/f'{split}.parquet')
    monkeypatch.setenv('FISHER_NODES_GLUE', str(here/'glue'))
    config = json.loads((here/'x'/'config.json').read_text()) | dict(id2label={0: 'negative', 1: 'positive'}, label2id=dict(negative=0, positive=1))
    (here/'x'/'config.json').write_text(json.dumps(config))
    found = compare(dict(x='x', y='y'), dict(x='glue:sst2', y='y.csv'), methods=['average', 'regmean'], num_samples=8, progress=False)
    assert found.rows['x'] == dict(held_out=12, rows=30, measured=8, says='its validation split, without 1 that are measured on too')
    rows = Dataset.from_dict(dict(sentence=valid, label=[i % 2 for i in (0, 1, 2, 3, 4, 6, 7, 8, 9, 10, 11, 12)]))
    assert found.scores[OWN]['x'] == evaluate('x', rows)['accuracy']

def test_models_and_rows_in_memory():
    "Tokenised rows; the models stay as they are; a held-out set for one task only."
    models = {t: make('bert', n, i) for i, (t, n) in enumerate(COUNTS.items())}
    g = torch.Generator().manual_seed(3)
    def rows(n, classes): return Dataset.from_dict(dict(input_ids=[torch.randint(4, 12, (8,), generator=g).tolist() for _ in range(n)], label=[i % classes for i in range(n)]))
    data, held = {t: rows(30, n) for t, n in COUNTS.items()}, dict(y=rows(21, 3))
    before = {t: {n: p.clone() for n, p in m.state_dict().items()} for t, m in models.items()}
    found = compare(models, data, held, methods=['average', 'mask-fisher'], num_samples=8, progress=False)
    assert found.rows['y'] == dict(held_out=21, rows=30, measured=8, says='as given') and found.rows['x']['held_out'] == 6
    plain = merge(models, method='average')
    assert found.scores['average']['y'] == evaluate(plain['y'], held['y'])['accuracy']
    for t, m in models.items():
        for n, p in m.state_dict().items(): assert_close(p, before[t][n], rtol=0, atol=0)

def test_rows_in_memory_asked_wrongly():
    models, rows = {t: make('bert', 2, i) for i, t in enumerate('xy')}, Dataset.from_dict(dict(text=texts(10, 1), label=[0, 1]*5))
    how = dict(methods=['average'], tokenizer=words(), progress=False)
    for data, more, say in ((rows, dict(text='review'), r"data of 'x': no column 'review' among \['text', 'label'\]"), (rows.remove_columns('label'), {}, "held-out rows of 'x': the data set has no `labels` or `label`"),
                            (rows.select([0, 0]), {}, "data of 'x': 1 different rows cannot be split"), (rows, dict(held_out=[rows]), 'held_out'), (rows, dict(share='a'), '`share` must be'), (rows, dict(seed=-1), '`seed` must be')):
        with pytest.raises(ValueError, match=say): compare(models, dict(x=data, y=rows), **how | more)

def comparison(own, **methods):
    scores = {OWN: own} | methods
    return Comparison(scores, dict.fromkeys(own, 'accuracy'), dict.fromkeys(methods, 1.), {}, {}, {})

def test_which_one_wins():
    "By the worst task against its own model, not by the mean, nor by the score itself; then by the mean; then by order."
    own = dict(a=.9, b=.5)
    assert comparison(own, one=dict(a=.9, b=.3), two=dict(a=.75, b=.4)).winner == 'two'
    assert comparison(own, one=dict(a=.6, b=.6), two=dict(a=.7, b=.3)).winner == 'two'
    assert comparison(own, one=dict(a=.8, b=.5), two=dict(a=.8, b=.6)).winner == 'two'
    assert comparison(own, one=dict(a=.8, b=.5), two=dict(a=.8, b=.5)).winner == 'one'
    assert comparison(own, one=dict(a=.8, b=.49)).tasks == ['a', 'b'] and comparison(own, one=dict(a=.9, b=.2)).tasks == ['b', 'a']

def test_one_method_that_cannot(here, monkeypatch):
    "Says why, and the others go on; where none can, that is the answer."
    real = comparing.merge
    def broken(models, method, **kw):
        if method in broken.methods: raise ValueError(f'{method} has no way')
        return real(models, method=method, **kw)
    monkeypatch.setattr(comparing, 'merge', broken)
    how = dict(methods=['average', 'regmean'], num_samples=8, progress=False)
    broken.methods = ['average']
    found = compare(dict(x='x', y='y'), dict(x='x.csv', y='y.csv'), **how)
    assert found.left_out == dict(average='average has no way') and found.winner == 'regmean' and 'left out: average: average has no way.' in str(found)
    broken.methods = ['average', 'regmean']
    with pytest.raises(ValueError, match='no method can merge these: average has no way'): compare(dict(x='x', y='y'), dict(x='x.csv', y='y.csv'), **how)

def test_a_base(here, capsys):
    said = run(f'compare {BOTH} --base base --methods average,ties,task-arithmetic --limit 5', capsys)
    run('merge x=x y=y --method ties --base base --out ties', capsys)
    assert set(said['scores']) == {OWN, 'average', 'ties', 'task-arithmetic'} and said['rows']['x']['held_out'] == 5

def test_unlabelled_rows_to_measure_on(here, capsys):
    "With held-out rows of their own; what reads labels is left out."
    for t in COUNTS: (here/f'bare-{t}.csv').write_text('\n'.join(o.rpartition(',')[0] for o in (here/f'{t}.csv').read_text().splitlines())+'\n')
    said = run(f'compare x=x y=y --data x=bare-x.csv y=bare-y.csv {HELD} --methods average,regmean,mask-fisher --num-samples 8', capsys)
    assert set(said['scores']) == {OWN, 'average', 'regmean'} and "no column 'label'" in said['left_out']['mask-fisher']
    assert main('compare x=x y=y --data x=bare-x.csv y=bare-y.csv'.split()) == 2
    assert "data of 'x': bare-x.csv: no column 'label'" in capsys.readouterr().err

def test_tables_fit(here, capsys):
    assert main(f'compare {BOTH} --num-samples 8 --methods average,residual-regression'.split()) == 0
    out = capsys.readouterr().out.splitlines()
    assert max(map(len, out)) <= 80 and out[0].split()[:2] == ['worst', 'mean'] and out[3].split()[0] == 'own'
    many = {f'a-rather-long-task-name-{i}': i/20 for i in range(9)}
    lines = str(comparison(many, **{'residual-regression': many, 'average': many})).splitlines()
    assert max(map(len, lines)) <= 80 and all(any(t in o for o in lines) for t in many)

def test_rows_that_the_own_models_may_know(here, capsys):
    "Said of rows that were split, in one line; not of those given, nor where the record says that they were learned."
    line = f'compare {BOTH} --methods average'
    say = '{} held out of rows that the own models may have been trained on; --held-out takes others.'
    def told(more=''):
        assert main(f'{line} {more}'.split()) == 0
        return ' '.join(capsys.readouterr().out.split())
    assert say.format('x, y:') in told() and say.format('y:') in (found := told('--held-out x=held-x.csv')) and 'x, y:' not in found
    assert 'may have been' not in told(HELD)
    assert [o.get('split') for o in run(f'{line} --held-out x=held-x.csv', capsys)['rows'].values()] == [None, True]
    found = comparison(dict(a=.9), average=dict(a=.9))
    found.rows = dict(a=dict(held_out=1, rows=4, measured=4, says='as given', split=True, learned=True))
    assert 'may have been' not in str(found) and 'a: 1 row held out' in str(found)

def test_few_held_out_rows_decide_little(here, capsys):
    "One warning with the numbers, of those tasks that have fewer than 30; none where all have as many."
    save_rows(here/'x.csv', texts(160, 'many'), 2)
    run(f'compare {BOTH} --methods average', capsys)
    assert len(run.err) == 1 and "8 rows of 'y' decide little: one answer is up to 12.5 points; hold out 30 or more of a task" in run.err[0] and "of 'x'" not in run.err[0]
    run(f'compare {BOTH} --methods average --limit 1', capsys)
    assert len(run.err) == 1 and "1 row of 'x' and 1 row of 'y' decide little: one answer is up to 100 points" in run.err[0]
    for n, more in ((29, 1), (30, 0)):
        save_rows(here/'held-y.csv', texts(n, 'held y'), 3)
        run(f'compare {BOTH} --held-out y=held-y.csv --methods average', capsys)
        assert len(run.err) == more
    with pytest.warns(UserWarning, match="1 row of 'y' decides nothing: one answer is up to 100 points"):
        compare(dict(x='x', y='y'), dict(x='x.csv', y='y.csv'), dict(y=Dataset.from_dict(dict(text=['a b'], label=[0]))), methods=['average'], progress=False)

MISTAKES = {
    'x=x y=y --data x=x.csv': "--data names ['x'], but the models are ['x', 'y']", 'x=x x=y --data x=x.csv': "task 'x' is given twice", f'{BOTH} --methods soup': "--methods has 'soup'",
    f'{BOTH} --methods ties': "'ties' needs --base", f'{BOTH} --methods average --base base': "none of the methods ['average'] takes --base", f'{BOTH} --share 0': '--share is 0; expected a number between 0 and 1',
    f'{BOTH} --share 0.001': "data of 'x': 40 different rows cannot be split by a share of 0.001", f'{BOTH} --share nan': "from 0 to 1, got 'nan'", f'{BOTH} --held-out z=x.csv': "--held-out names 'z', which is no task",
    'x=x y=y --data x=none.csv y=y.csv': 'none.csv', 'x=x y=none --data x=x.csv y=y.csv': 'cannot load none', 'x=x y=y --data x=y.csv y=y.csv': "data of 'x': y.csv: row", f'{BOTH} --save x --overwrite': "is, holds or lies in the model of 'x'",
    f'{BOTH} --out x.csv': 'is a file, not a folder', f'{BOTH} --save full': 'is not empty', f'{BOTH} --out full --overwrite --save full/a': 'must be two folders', f'{BOTH} --limit 0': 'expected a whole number of at least 1', f'{BOTH} --text nope': "column 'nope'",
    f'{BOTH} {HELD} --out . --overwrite': "of 'x'"}

@pytest.mark.parametrize('line, say', MISTAKES.items())
def test_mistakes(line, say, here, capsys):
    (here/'full').mkdir(); (here/'full'/'notes.txt').write_text('mine')
    before = {o: o.is_file() and o.read_bytes() for o in here.rglob('*')}
    try: status = main(['compare', *line.split()])
    except SystemExit as e: status = e.code
    text = [o for o in capsys.readouterr().err.splitlines() if o.startswith('fisher-nodes')]
    assert status == 2 and len(text) == 1 and say in text[0], text
    assert {o: o.is_file() and o.read_bytes() for o in here.rglob('*')} == before

def test_written_again(here, capsys):
    "An earlier table and an earlier winner are replaced where that is asked for, and only those."
    line = f'compare {BOTH} --num-samples 8 --methods average --save won --out table'
    run(line, capsys)
    for o in ('won', 'table'): (here/o/'notes.txt').write_text('mine')
    assert main(line.split()) == 2 and 'is not empty' in capsys.readouterr().err
    run(line.replace('average', 'average,regmean')+' --overwrite', capsys)
    assert set(json.loads((here/'table'/'compare.json').read_text())['scores']) == {OWN, 'average', 'regmean'}
    assert all((here/o/'notes.txt').read_text() == 'mine' for o in ('won', 'table'))


# --- beside a score ---------------------------------------------------------------------------

SCORED = 'evaluate m --data x=held-x.csv y=held-y.csv'

def test_own_models_and_average_beside(here, capsys):
    "The same as each scored by itself; the merge's own score is as it is alone."
    run('merge x=x y=y --data x=x.csv y=y.csv --num-samples 8 --out m', capsys)
    run('merge x=x y=y --method average --out plain', capsys)
    found, alone, plain = run(f'{SCORED} --out s.json', capsys), run(f'{SCORED} --alone', capsys), run('evaluate plain --alone --data x=held-x.csv y=held-y.csv', capsys)
    for t in COUNTS:
        own = run(f'evaluate {t} --data held-{t}.csv', capsys)[f'held-{t}.csv']['accuracy']
        assert found[t] == alone[t] | dict(own_accuracy=own, average_accuracy=plain[t]['accuracy'])
    assert json.loads(Path('s.json').read_text())['scores'] == found and list(alone['x']) == ['accuracy']
    assert main(SCORED.split()) == 0
    assert max(map(len, capsys.readouterr().out.splitlines())) <= 80

def test_an_adapter_whose_base_is_on_the_hub(here, capsys, monkeypatch):
    "It is a folder, but loading it would ask the Hub; that is not done unasked."
    run('merge x=x y=y --method average --out m', capsys)
    (here/'y'/'adapter_config.json').write_text(json.dumps(dict(base_model_name_or_path='some/base')))
    monkeypatch.setattr(comparing, 'load_reference', lambda *o: pytest.fail('asked for'))
    assert all(list(o) == ['accuracy'] for o in run(SCORED, capsys).values())
    assert len(run.err) == 1 and "the model of 'y', some/base, is on the Hub" in run.err[0]

@pytest.mark.parametrize('gone, say', [('moved', "the model of 'y' is no longer at"), ('changed', "of 'y'"), ('memory', "the recipe has no name for the model of 'x'"), ('hub', "the model of 'y', some/y, is on the Hub; --fetch loads it")])
def test_own_models_that_are_not_there(gone, say, here, capsys, monkeypatch):
    "One line says so, and the score is there all the same; the Hub is not asked."
    if gone == 'memory': merge({t: make('bert', n, i) for i, (t, n) in enumerate(COUNTS.items())}, method='average', tokenizer=words()).save_pretrained('m')
    else: run('merge x=x y=y --method average --out m', capsys)
    if gone == 'moved': (here/'y').rename(here/'z')
    if gone == 'changed': make('bert', 3, 8).save_pretrained('y')
    if gone == 'hub':
        text = (here/'m'/'recipe.yml').read_text()
        (here/'m'/'recipe.yml').write_text(text.replace('model: ../y', 'model: some/y'))
        monkeypatch.setattr(comparing, 'load_reference', lambda *o: pytest.fail('asked for'))
    found = run(SCORED, capsys)
    assert all(list(o) == ['accuracy'] for o in found.values())
    assert len(run.err) == 1 and 'own models and their average are not shown' in run.err[0] and say in run.err[0], run.err

def test_scores_into_the_card(here, capsys):
    "Into table and metadata; the rest of the folder stays, and it loads and is recognised as before."
    run('merge x=x y=y --method average --out m', capsys)
    (here/'m'/'notes.txt').write_text('mine')
    before = {o.relative_to(here).as_posix(): o.read_bytes() for o in (here/'m').rglob('*') if o.is_file()}
    found = run(f'{SCORED} --update-card', capsys)
    after = {o.relative_to(here).as_posix(): o.read_bytes() for o in (here/'m').rglob('*') if o.is_file()}
    assert {k for k in after if after[k] != before.get(k)} == {'m/README.md', 'm/merge_report.json'} and set(after) == set(before)
    card = ModelCard.load('m/README.md')
    assert {o.dataset_name: o.metric_value for o in card.data.eval_results} == {t: o['accuracy'] for t, o in found.items()}
    assert f'accuracy {found["x"]["accuracy"]:.4g}' in card.text and 'from_pretrained("m")' in card.text and 'weights were changed' not in card.text
    assert Merged.from_pretrained('m').report['scores'] == {t: dict(accuracy=o['accuracy']) for t, o in found.items()}
    run(f'{SCORED} --update-card', capsys)
    assert (here/'m'/'README.md').read_bytes() == after['m/README.md']
    run('merge x=x y=y --method average --weights x=2 y=1 --out m --overwrite', capsys)
    assert (here/'m'/'notes.txt').read_text() == 'mine'

def test_how_many_rows_were_scored(here, capsys):
    "In table, file, card and metadata; of how many, where it is a part of them."
    from fisher_nodes.merging.card import read_report
    run('merge x=x y=y --method average --out m', capsys)
    for more, told, rows, said in (('--limit 10', '10 of 25', 10, '10 of 25 rows'), ('', '25', 25, '25 rows')):
        assert main(f'{SCORED} --alone --update-card --out scores.json --overwrite {more}'.split()) == 0
        head, *lines = capsys.readouterr().out.splitlines()
        assert head.split() == ['accuracy', 'rows'] and [o.split(maxsplit=2)[2] for o in lines[:2]] == [told]*2
        count = dict(rows=rows, of=25)
        assert json.loads(Path('scores.json').read_text())['rows'] == dict(x=count, y=count)
        card = ModelCard.load('m/README.md')
        assert f' on {said} |' in card.text and [o.dataset_args for o in card.data.eval_results] == [count]*2
        assert read_report(Path('m/merge_report.json'))['scored_rows'] == dict(x=count, y=count)
    Merged.from_pretrained('m').save_pretrained('again', scores=dict(x=dict(accuracy=.5)))
    assert 'accuracy 0.5 |' in ModelCard.load('again/README.md').text, 'of other scores nothing is known'
    report = json.loads(Path('m/merge_report.json').read_text()) | dict(scored_rows=dict(x=dict(rows='ten', of=25)))
    Path('odd.json').write_text(json.dumps(report))
    with pytest.raises(ValueError, match='odd.json is not a merge report.*scored_rows'): read_report(Path('odd.json'))

def test_rows_that_were_measured_on_are_named(here, capsys):
    "By what the file holds, whatever it is called; a winner's by its name. Other rows, and a merge that measured none, are left alone."
    run('merge x=x y=y --data x=x.csv y=y.csv --num-samples 8 --out m', capsys)
    shutil.copy('x.csv', 'other.csv')
    run('evaluate m --alone --data x=other.csv y=held-y.csv', capsys)
    assert len(run.err) == 1 and "measured on rows of what is scored: 'x' (other.csv); other rows say" in run.err[0]
    run(SCORED.replace('evaluate m', 'evaluate m --alone'), capsys)
    assert run.err == []
    run('merge x=x y=y --method average --out plain', capsys)
    run('evaluate plain --alone --data x=x.csv y=y.csv', capsys)
    assert run.err == []
    run(f'compare {BOTH} --methods mask-fisher --save won', capsys)
    assert 'on 8 rows |' in ModelCard.load('won/README.md').text
    run('evaluate won --alone --data x=x.csv y=held-y.csv', capsys)
    assert len(run.err) == 1 and "'x' (a file called x.csv)" in run.err[0]

def test_a_card_of_ones_own_stays(here, capsys):
    run('merge x=x y=y --method average --out m', capsys)
    card = here/'m'/'README.md'
    card.write_text(card.read_text()+'And a word of mine.\n')
    before = {o: o.read_bytes() for o in (here/'m').rglob('*') if o.is_file()}
    assert main(f'{SCORED} --update-card'.split()) == 2 and 'README.md was changed since it was written' in capsys.readouterr().err
    assert {o: o.read_bytes() for o in (here/'m').rglob('*') if o.is_file()} == before
    for o in ('--update-card', '--alone', '--fetch'):
        assert main(f'evaluate x --data held-x.csv {o}'.split()) == 2 and f'{o} is about a merged model' in capsys.readouterr().err

def test_the_name_on_the_hub_stays(here, capsys):
    merge(dict(x='x', y='y'), method='average').save_pretrained('m', repo_id='some/merge')
    run(f'{SCORED} --alone --update-card', capsys)
    assert 'from_pretrained("some/merge")' in (here/'m'/'README.md').read_text()

def test_the_shell_measures_as_many_rows_as_python(here, capsys):
    save_rows(here/'x.csv', texts(200, 'many'), 2)
    said = run(f'compare {BOTH} --methods average --limit 5', capsys)
    assert said['rows']['x']['measured'] == 128 < said['rows']['x']['rows'] and said['rows']['y']['measured'] == said['rows']['y']['rows']

def test_one_model_is_not_compared(here, capsys):
    assert main('compare x=x --data x=x.csv'.split()) == 2 and "there is one model, 'x'; give two to merge" in capsys.readouterr().err

def test_what_is_even_is_said():
    found = Comparison({OWN: dict(a=.9, b=.8), 'average': dict(a=.8, b=.8), 'ties': dict(a=.8, b=.8)}, dict(a='accuracy', b='accuracy'), {}, {}, {}, {})
    assert found.why.startswith('average won, even with ties: ')
    found.scores['ties']['b'] = .7
    assert found.why.startswith('average won: ')

def test_a_card_names_the_rows_that_were_scored_not_those_that_were_measured():
    from fisher_nodes.merging.card import eval_results
    measured, scores = dict(data=dict(a='glue:sst2')), dict(scores=dict(a=dict(accuracy=.5)))
    assert eval_results(scores | dict(scored={}), measured)[0].dataset_name == 'a'
    assert eval_results(scores | dict(scored=dict(a='glue:rte')), measured)[0].dataset_name == 'GLUE rte'
    assert eval_results(scores, measured)[0].dataset_name == 'GLUE sst2'
