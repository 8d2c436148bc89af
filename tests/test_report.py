"""Result files to tables and plots: what is refused, and every number against a slow loop over the JSON itself."""
import ast
import json
import statistics
from copy import deepcopy
from itertools import combinations
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib import pyplot as plt
from numpy.testing import assert_allclose

from fisher_nodes.experiment import intervals, plots
from fisher_nodes.experiment import report as module
from fisher_nodes.experiment import results as reading
from fisher_nodes.app.explorer import plot_winners
from fisher_nodes.core.fisher import MaskFisher
from fisher_nodes.engine.files import OutputExistsError
from fisher_nodes.experiment.plots import (
    pair_matrix, plot_cost, plot_errors, plot_gains, plot_heads, plot_pairs, plot_rows, plot_samples,
    plot_scores)
from fisher_nodes.experiment.report import report
from fisher_nodes.experiment.intervals import (
    PAPER_TABLE1, bootstrap, fast_median, paired_scores, per_seed, summarise, table1, verdict)
from fisher_nodes.experiment.results import (
    as_text, choose, commands, for_readers, load_bench, load_errors, load_results, markdown, origin_table, provenance)

matplotlib.use('agg')
TASKS = dict(mnli=(.73, .35), qqp=(.86, .63), mrpc=(.72, .68), rte=(.65, .53))  # own accuracy, majority; mrpc is flagged
HASHES = {t: f'hash of {t}' for t in TASKS}
ABOUT = dict(device='cpu', precision=None, versions=dict(torch='2.0'), machine='x86_64', commit='abc', date='2026-01-01')


def result(name, size=2, n=None, seed=None, **change):
    rng = np.random.default_rng([len(name), size, n or 0, seed or 0])

    def scores(task): return dict(accuracy=TASKS[task][0]*rng.uniform(.6, 1.02)) | (dict(f1=rng.uniform(.5, .9)) if task in ('qqp', 'mrpc') else {})
    groups = {'+'.join(g): dict(scores={t: scores(t) for t in g}, merge_seconds=1., evaluate_seconds=2.) for g in combinations(TASKS, size)}
    return dict(name=name, merge=dict(method=name, options={}), group_size=size, num_samples=n, seed=seed, limit=1000, models=HASHES,
                groups=groups, **ABOUT) | change


def own():
    models = {t: dict(model=t, weight_hash=HASHES[t], scores=dict(accuracy=a), majority=m, rows=1000, train_rows=9999) for t, (a, m) in TASKS.items()}
    models['qqp']['scores']['f1'] = .9
    return dict(checkpoints='small', limit=1000, models=models, seconds=1., **ABOUT)


def errors(): return [dict(task=t, name='mask-fisher', variant=v, num_samples=n, seed=s, reference=32768, heads=(1+i)/n*100, rows=2/n*100,
                           heads_rank=1-1/n, rows_rank=1-2/n) for i, t in enumerate(TASKS) for v in ('paper', 'released') for n in (128, 2048) for s in (0, 1)]


def results():
    runs = [result('average'), result('average', 3), result('average', 4), result('dare', seed=0), result('dare', seed=1), result('mask-fisher', 3, 128, 0),
            result('mask-fisher', 4, 128, 0), *(result('mask-fisher', n=128, seed=s) for s in range(3)), result('mask-fisher', n=2048, seed=0),
            *(result('change-x', n=128, seed=s) for s in (1, 2, 7))]
    return {f'{o["name"]}-k{o["group_size"]}-n{o["num_samples"]}-s{o["seed"]}': o for o in runs}


def write(folder, files):
    folder.mkdir(parents=True, exist_ok=True)
    for name, o in files.items(): (folder/f'{name}.json').write_text(o if isinstance(o, str) else json.dumps(o, indent=1))
    return folder


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    return write(tmp_path_factory.mktemp('results'), results() | dict(own=own(), fisher_error=dict(errors=errors())))


@pytest.fixture(scope='module')
def table(folder): return load_results(folder)


@pytest.fixture(autouse=True)
def no_figures():
    yield
    plt.close('all')


def slow_scores(name, size=2, n=None, seed=None):
    "Normalised scores of one file, in its own order."
    groups = next(o for o in results().values() if (o['name'], o['group_size'], o['num_samples'], o['seed']) == (name, size, n, seed))['groups']
    return {g: {t: 100*s['accuracy']/TASKS[t][0] for t, s in o['scores'].items()} for g, o in groups.items()}


def flat(scores): return [v for o in scores.values() for v in o.values()]


# reading

def test_rows(table):
    assert len(table) == sum(len(o['groups'])*o['group_size'] for o in results().values())
    assert str(table.num_samples.dtype) == str(table.seed.dtype) == 'Int64' and table.flagged.dtype == bool
    rows = choose(table, 'mask-fisher', 128)
    for o in rows.itertuples():
        assert_allclose(o.normalised, slow_scores('mask-fisher', 2, 128, o.seed)[o.group][o.task], rtol=1e-12)
        assert o.own_accuracy == TASKS[o.task][0] and o.flagged == (o.task == 'mrpc') and np.isnan(o.f1) == (o.task not in ('qqp', 'mrpc'))
    assert set(table[table.own_f1.notna()].task) == {'qqp'}


def test_order_of_tasks_in_a_group_is_no_information(tmp_path, table):
    runs = results()
    for o in runs.values(): o['groups'] = {'+'.join(reversed(g.split('+'))): v for g, v in reversed(o['groups'].items())}
    again = summarise(load_results(write(tmp_path, runs | dict(own=own()))))
    pd.testing.assert_frame_equal(again, summarise(table))


def broken(change):
    o = result('mask-fisher', n=64, seed=0)
    change(o)
    return o


def drop(key): return lambda o: o.pop(key)
def put(key, value): return lambda o: o.update({key: value})
def first(o): return next(iter(o['groups'].values()))


BROKEN = {
    'cut': ('is not JSON', '{"name": "mask-'), 'empty': ('is not JSON', ''), 'list': ('expected an object, got list', '[1]'), 'null': ('got NoneType', 'null'),
    **{f'no {k}': (f'no {k!r}', broken(drop(k))) for k in ('name', 'group_size', 'num_samples', 'seed', 'limit', 'models', 'groups')},
    'name': ("'name' cannot be 3", broken(put('name', 3))), 'seed': ("'seed' cannot be '0'", broken(put('seed', '0'))),
    'N': ("'num_samples' cannot be 1.5", broken(put('num_samples', 1.5))), 'limit': ('limit 50, but own.json has limit 1000', broken(put('limit', 50))),
    'no limit': ('limit None', broken(put('limit', None))),
    'weights': ('other weights of rte', broken(lambda o: o.update(models=HASHES | dict(rte='x')))),
    'fewer models': ('other weights of rte', broken(lambda o: o.update(models={k: v for k, v in HASHES.items() if k != 'rte'}))),
    'more models': ('other weights of cola', broken(lambda o: o.update(models=HASHES | dict(cola='x')))),
    'group of three': ("is no group of 2 of", broken(lambda o: o['groups'].update({'mnli+qqp+rte': first(o)}))),
    'unknown task': ("'cola+mnli' occurs twice or is no group", broken(lambda o: o['groups'].update({'cola+mnli': first(o)}))),
    'twice': ("'mnli+qqp' occurs twice", broken(lambda o: o['groups'].update({'qqp+mnli': first(o)}))),
    'with itself': ("'mnli' occurs twice or is no group", broken(lambda o: o['groups'].update({'mnli+mnli': first(o)}))),
    'missing group': ('incomplete: 1 of 6 groups are missing, such as mnli+qqp', broken(lambda o: o['groups'].pop('mnli+qqp'))),
    'no scores': ("mnli+qqp: no 'scores'", broken(lambda o: first(o).pop('scores'))),
    'group is a number': ("mnli+qqp: expected an object, got 1", broken(lambda o: o['groups'].update({'mnli+qqp': 1}))),
    'no task': ("mnli+qqp: no 'qqp'", broken(lambda o: first(o)['scores'].pop('qqp'))),
    'no accuracy': ("no 'accuracy'", broken(lambda o: first(o)['scores']['qqp'].pop('accuracy'))),
    'percent': ('accuracy 73.0 is not between 0 and 1', broken(lambda o: first(o)['scores']['qqp'].update(accuracy=73.))),
    'nan': ('accuracy nan', broken(lambda o: first(o)['scores']['qqp'].update(accuracy=float('nan')))),
    'text': ("'accuracy' cannot be '0.5'", broken(lambda o: first(o)['scores']['qqp'].update(accuracy='0.5'))),
    'f1': ('f1 -1 is not between', broken(lambda o: first(o)['scores']['qqp'].update(f1=-1))),
    'same setting': ('hold the same setting', result('average')), 'other options': ('named mask-fisher, but merge differently',
                                                                                   broken(put('merge', dict(method='ties')))),
}


@pytest.mark.parametrize('case', BROKEN)
def test_a_file_that_does_not_belong_is_named(case, tmp_path):
    message, content = BROKEN[case]
    write(tmp_path, results() | dict(own=own(), zz=content))
    with pytest.raises(ValueError) as e: load_results(tmp_path)
    assert message in str(e.value) and 'zz.json' in str(e.value), str(e.value)


OWN_BROKEN = {
    'not JSON': (lambda o: '{', 'is not JSON'), 'no models': (lambda o: o.pop('models'), "no 'models'"), 'no limit': (lambda o: o.pop('limit'), "no 'limit'"),
    'no hash': (lambda o: o['models']['qqp'].pop('weight_hash'), "qqp: no 'weight_hash'"),
    'no majority': (lambda o: o['models']['qqp'].pop('majority'), "qqp: no 'majority'"),
    'no accuracy': (lambda o: o['models']['qqp']['scores'].pop('accuracy'), "no 'accuracy'"),
    'nothing right': (lambda o: o['models']['qqp']['scores'].update(accuracy=0.), 'qqp has accuracy 0'),
}


@pytest.mark.parametrize('case', OWN_BROKEN)
def test_own_is_checked(case, tmp_path):
    change, message = OWN_BROKEN[case]
    o = own()
    o = '{' if change(o) == '{' else o
    write(tmp_path, results() | dict(own=o))
    with pytest.raises(ValueError) as e: load_results(tmp_path)
    assert message in str(e.value) and 'own.json' in str(e.value)


@pytest.mark.parametrize('name', ['own', 'zz'])
def test_a_file_of_a_later_version_is_refused(tmp_path, name):
    files = dict(own=own(), zz=result('mask-fisher', n=64, seed=0))
    files |= {name: files[name] | dict(schema=2)}
    write(tmp_path, files)
    with pytest.raises(ValueError, match=f'{name}.json has schema 2, but this version reads 1'): load_results(tmp_path)
    write(tmp_path, {name: files[name] | dict(schema=1)})
    assert len(load_results(tmp_path)) == 12


def test_missing(tmp_path):
    with pytest.raises(FileNotFoundError, match='has no own.json'): load_results(tmp_path)
    write(tmp_path, dict(own=own()))
    with pytest.raises(ValueError, match='has no results'): load_results(tmp_path)
    with pytest.raises(FileNotFoundError, match='has no fisher_error.json'): load_errors(tmp_path)
    with pytest.raises(ValueError, match='no timed steps'): load_bench(tmp_path/'bench')


def test_partial(tmp_path):
    runs = results()
    del runs['mask-fisher-k2-n128-s1']['groups']['mnli+qqp'], runs['mask-fisher-k2-n2048-s0']['groups']['mrpc+rte']
    write(tmp_path, runs | dict(own=own()))
    with pytest.raises(ValueError, match='is incomplete'): load_results(tmp_path)
    table = load_results(tmp_path, partial=True)
    a, b = paired_scores(choose(table, 'mask-fisher', 128), choose(table, 'average'))
    assert a.shape == (3, 5, 2) and b.shape == (1, 5, 2)
    summary = summarise(table, resamples=50).set_index(['group_size', 'name', 'num_samples'])
    assert summary.loc[(2, 'mask-fisher', 128), 'scores'] == 10 and summary.loc[(2, 'mask-fisher', 2048), 'scores'] == 10
    left = [g for g in slow_scores('average') if g != 'mrpc+rte']
    gain = statistics.median(slow_scores('mask-fisher', 2, 2048, 0)[g][t] for g in left for t in g.split('+'))
    gain -= statistics.median(slow_scores('average')[g][t] for g in left for t in g.split('+'))
    assert_allclose(summary.loc[(2, 'mask-fisher', 2048), 'gain'], gain, rtol=1e-12)


def test_a_file_that_is_being_written_is_not_read(folder, tmp_path, table):
    write(tmp_path, results() | dict(own=own()))
    (tmp_path/'.average-k2.json.123.part').write_text('{')
    (tmp_path/'cache').mkdir()
    (tmp_path/'cache'/'x.json').write_text('{')
    assert len(load_results(tmp_path)) == len(table)


# numbers

def test_summary_equals_a_slow_loop(table):
    summary = summarise(table, resamples=100).set_index(['group_size', 'name', 'num_samples'])
    runs = [flat(slow_scores('mask-fisher', 2, 128, s)) for s in range(3)]
    row = summary.loc[(2, 'mask-fisher', 128)]
    for name, f in dict(median=statistics.median, mean=statistics.fmean, min=min).items():
        assert_allclose(row[name], statistics.fmean(map(f, runs)), rtol=1e-12)
    assert_allclose(row.median_sd, statistics.stdev(map(statistics.median, runs)), rtol=1e-12)
    assert_allclose(row.mean_sd, statistics.stdev(map(statistics.fmean, runs)), rtol=1e-12)
    average = flat(slow_scores('average'))
    assert_allclose(row.gain, row['median']-statistics.median(average), rtol=1e-12)
    assert_allclose(row.mean_gain, row['mean']-statistics.fmean(average), rtol=1e-12)
    assert (row.scores, row.seeds) == (12, 3)
    assert row.gain_low <= row.gain_high and row.mean_gain_low <= row.mean_gain <= row.mean_gain_high


def test_summary_of_every_group_size(table):
    summary = summarise(table, resamples=50)
    assert summary.group_size.tolist() == sorted(summary.group_size)
    pairs = summary[summary.group_size == 2]
    assert [(o.name, 0 if o.num_samples is pd.NA else o.num_samples) for o in pairs.itertuples()] == [
        ('average', 0), ('mask-fisher', 128), ('mask-fisher', 2048), ('dare', 0), ('change-x', 128)]
    def of(size, name): return summary[(summary.group_size == size) & (summary['name'] == name)].iloc[0]
    assert of(3, 'average').scores == 12 and of(4, 'average').scores == 4
    assert of(3, 'average').flagged == 3 and of(4, 'mask-fisher').flagged == 1 and of(2, 'dare').flagged == 3
    assert of(2, 'dare').seeds == 2 and of(2, 'dare').median_sd > 0
    one = of(4, 'mask-fisher')  # one group of all four: a gain, and nothing to draw
    assert_allclose(one.gain, statistics.median(flat(slow_scores('mask-fisher', 4, 128, 0)))-statistics.median(flat(slow_scores('average', 4))), rtol=1e-12)
    assert pd.isna(one.gain_low) and pd.isna(one.median_sd)


def test_no_flag_is_zero(tmp_path):
    o = own()
    o['models']['mrpc']['majority'] = .5
    summary = summarise(load_results(write(tmp_path, results() | dict(own=o))), resamples=10)
    assert summary.flagged.tolist() == [0]*len(summary)


def test_baseline_at_the_same_samples_and_seeds(table):
    "change-x has seeds 1, 2 and 7, the masks 0, 1 and 2: the gain is over 1 and 2."
    summary = summarise(table, baseline='mask-fisher', resamples=100).set_index(['group_size', 'name', 'num_samples'])
    medians = {name: statistics.fmean(statistics.median(flat(slow_scores(name, 2, 128, s))) for s in (1, 2)) for name in ('change-x', 'mask-fisher')}
    assert_allclose(summary.loc[(2, 'change-x', 128), 'gain'], medians['change-x']-medians['mask-fisher'], rtol=1e-12)
    assert summary.loc[2].loc['mask-fisher'].gain.isna().all()
    assert summary[summary.index.get_level_values('name') == 'average'].gain.isna().all(), 'no single N to compare with'
    assert summarise(table, baseline='nothing', resamples=10).gain.isna().all()


def test_order_of_rows_is_no_information(table):
    shuffled = table.sample(frac=1, random_state=0).reset_index(drop=True)
    pd.testing.assert_frame_equal(summarise(shuffled, resamples=200), summarise(table, resamples=200))


def test_summarise_changes_nothing(table):
    before = table.copy(deep=True)
    summarise(table, resamples=10); per_seed(table); pair_matrix(choose(table, 'average')); plot_pairs(table, 'average')
    pd.testing.assert_frame_equal(table, before)


def bca(value, draws, without, level):
    "Efron's formulas, number by number."
    normal, middle = statistics.NormalDist(), statistics.fmean(without)
    bias = normal.inv_cdf((sum(o < value for o in draws)+sum(o <= value for o in draws))/2/len(draws))
    skew = sum((middle-o)**3 for o in without)/6/sum((middle-o)**2 for o in without)**1.5
    def moved(z): return normal.cdf(bias+(bias+z)/(1-skew*(bias+z)))
    return np.quantile(draws, [moved(normal.inv_cdf(o)) for o in ((1-level)/2, (1+level)/2)])


@pytest.mark.parametrize('statistic', [np.median, np.mean])
@pytest.mark.parametrize('shape', [(1, 15, 2), (3, 15, 2), (2, 20, 3)])
def test_bootstrap_equals_a_slow_loop(statistic, shape):
    rng, n = np.random.default_rng(3), shape[1]
    a, b = rng.normal(90, 5, shape), rng.normal(88, 5, (1, *shape[1:]))

    def value(groups): return statistics.fmean(statistic([x for g in groups for x in s[g]]) for s in a)-statistic([x for g in groups for x in b[0][g]])
    draws = [value(d) for d in np.random.default_rng(5).integers(n, size=(300, n))]
    without = [value([j for j in range(n) if j != i]) for i in range(n)]
    got = bootstrap(a, b, statistic, resamples=300, seed=5, level=.9)
    assert_allclose(got, [value(range(n)), *bca(value(range(n)), draws, without, .9)], rtol=1e-9)


def test_bootstrap_where_no_pair_matters_alone():
    "Without any one pair the median is the same: no skew can be told, and the middle of the draws is the interval."
    same = np.array([0., 0, 0, 0, 0, 9, 9]).reshape(1, 7, 1)
    assert {statistics.median(np.delete(same[0, :, 0], i)) for i in range(7)} == {0.}
    draws = [statistics.median(same[0, d, 0]) for d in np.random.default_rng(5).integers(7, size=(300, 7))]
    assert_allclose(bootstrap(same, np.zeros_like(same), resamples=300, seed=5)[1:], np.quantile(draws, [.025, .975]), rtol=1e-12)
    assert max(draws) == 9


def test_bootstrap_is_seeded_and_draws_nothing_of_the_callers():
    a, b = np.random.default_rng(0).normal(size=(2, 1, 15, 2))
    state = np.random.get_state()[1].tolist()
    assert bootstrap(a, b) == bootstrap(a, b) != bootstrap(a, b, seed=1)
    assert np.random.get_state()[1].tolist() == state


def test_bootstrap_is_paired():
    "Two methods that differ by a constant have no uncertain difference, however much the groups differ."
    b = np.random.default_rng(0).normal(0, 50, (1, 15, 2))
    assert_allclose(bootstrap(b+2, b), [2, 2, 2], rtol=1e-9)
    with pytest.raises(ValueError, match='not of the same groups'): bootstrap(b, b[:, 1:])


def test_bootstrap_covers():
    "Of 200 experiments with a true gain of 1, the 95% interval of the mean covers it about as often as it says."
    rng, hits = np.random.default_rng(0), 0
    for i in range(200):
        b = rng.normal(0, 3, (1, 15, 2))
        low, high = bootstrap(b+1+rng.normal(0, 2, (1, 15, 1)), b, np.mean, resamples=400, seed=i)[1:]
        hits += low <= 1 <= high
    assert 170 <= hits <= 198


# tables

def test_table1(table):
    summary = summarise(table, resamples=10)
    found = table1({'bert-base': summary, 'small': summary})
    assert list(found.index) == [('bert-base', 'here'), ('bert-base', 'here minus paper'), ('small', 'here')]
    by = summary.set_index(['group_size', 'name', 'num_samples'])['median']
    here = found.loc['bert-base', 'here']
    assert here[('mask Fisher', '2,048')] == by[2, 'mask-fisher', 2048]
    assert np.isnan(here[('mask Fisher', '32,768')]) and np.isnan(here[('full Fisher', '128')])
    assert_allclose(found.loc['bert-base', 'here minus paper'][('mask Fisher', '128')], by[2, 'mask-fisher', 128]-95.2, rtol=1e-12)
    assert (table1().to_numpy() == np.array(list(PAPER_TABLE1.values()))).all() and list(table1().index) == [*PAPER_TABLE1]
    assert list(table1().columns) == list(found.columns)
    mean = table1({'small': summary}, statistic='mean').loc['small', 'here'][('mask Fisher', '128')]
    assert_allclose(mean, summary.set_index(['group_size', 'name', 'num_samples'])['mean'][2, 'mask-fisher', 128], rtol=1e-12)


def test_paper_numbers_are_the_papers():
    "Against the gains over averaging that the paper prints beside them."
    gains = {m: [round(r[i]-r[0], 1) for i in (4, 5, 6)] for m, r in PAPER_TABLE1.items()}
    assert gains == {'bert-base': [4., 1.6, 2.5], 'bert-large': [4.3, 2.3, 2.1], 'bert-tiny': [-4.7, -2.4, -2.1], 'roberta-base': [6.5, 3.2, 2.6]}


def test_as_text_and_markdown():
    o = pd.DataFrame(dict(a_b=[1.25, np.nan], n=pd.array([2048, None], 'Int64'), s=['x', None], i=[3, 4], b=[True, False]))
    assert as_text(o, 2).values.tolist() == [['1.25', '2,048', 'x', '3', 'True'], ['–', '–', '–', '4', 'False']]
    assert markdown(o).splitlines()[:2] == ['| a b | n | s | i | b |', '|---|---|---|---|---|']
    assert markdown(o.assign(s='x|y')).splitlines()[2] == '| 1.2 | 2,048 | x\\|y | 3 | True |'
    assert len({line.count('|') for line in markdown(o).splitlines()}) == 1


def test_for_readers():
    "Names of columns and levels become words, and whole numbers have commas; what stands in a line's margin is left."
    o = pd.DataFrame(dict(median_sd=[1.25, np.nan], own=[2048, 3]), index=pd.MultiIndex.from_tuples([('gain', 32768), ('min', 128)], names=['name', 'num_samples']))
    said = for_readers(o)
    assert list(said) == ['sd of the median', 'own'] and list(said.index.names) == ['method', 'N']
    assert said.index.tolist() == [('gain', '32,768'), ('min', '128')] and said.values.tolist() == [['1.2', '2,048'], ['–', '3']]
    wide = for_readers(o.own.unstack())
    assert wide.columns.name == 'N' and list(wide) == ['128', '32,768'] and list(o) == ['median_sd', 'own']


def test_origins_of_several_folders(tmp_path):
    one = provenance(write(tmp_path/'one', results() | dict(own=own())))
    two = provenance(write(tmp_path/'two', dict(own=own(), a=result('average'))))
    lines = origin_table(dict(one=one, two=two)).splitlines()
    assert lines[0] == '|  | one | two |' and '| N | 128, 2,048 | none |' in lines and '| models | 2, 3, 4 | 2 |' in lines
    assert '| validation rows at most | 1,000 | 1,000 |' in lines and not any('checkpoints' in o for o in lines)
    assert one.num_samples == '128, 2048'


def test_provenance(tmp_path):
    runs = results()
    runs['average-k2-nNone-sNone'] |= dict(commit='def', device='cuda')
    about = provenance(write(tmp_path, runs | dict(own=own())))
    assert about.commit == 'abc, def' and about.device == 'cpu, cuda' and about.precision == 'none'
    assert about.num_samples == '128, 2048' and about.seed == '0, 1, 2, 7' and about.versions == 'torch 2.0' and about['validation rows at most'] == '1000'


def test_commands_make_the_same_cells(folder):
    grid = pytest.importorskip('fisher_nodes.experiment.grid')
    made = set()
    for line in commands(folder):
        words = line.split()
        at = {k[2:]: v.split(',') for k, v in zip(words[2::2], words[3::2])}
        names = [o for o in at['methods'] if o in grid.ENTRIES]  # `change-x` is none
        assert at['tasks'] == list(TASKS)
        if not names: continue
        kw = {k: [int(o) for o in at[k.replace('_', '-')]] for k in ('samples', 'seeds', 'group_sizes') if k.replace('_', '-') in at}
        made |= {(o.name, o.group_size, o.num_samples, o.seed) for o in grid.plan_cells(names, **kw)}
        assert at['limit'] == ['1000'] and ('base' in at) == ('dare' in names)
    assert made == {(o['name'], o['group_size'], o['num_samples'], o['seed']) for o in results().values() if o['name'] != 'change-x'}


def test_commands_of_some_rows(folder, table):
    assert [o.split(' --methods ')[1].split()[0] for o in commands(folder, results=table[table.name.isin(['dare', 'average'])])] == ['average', 'dare']
    line, = commands(folder, 'there', 'BODY', table[table.name == 'dare'])
    assert line == f'fisher-nodes reproduce --checkpoints there --methods dare --seeds 2 --group-sizes 2 --base BODY --limit 1000 --tasks {",".join(TASKS)} --out {folder}'


@pytest.mark.parametrize('ends,says', [((.1, 2.), 'more'), ((-2., -.1), 'less'), ((-1., 1.), 'not decided'), ((0., 1.), 'not decided'), ((np.nan, np.nan), 'no interval')])
def test_verdict(ends, says): assert verdict(*ends) == says


@pytest.mark.parametrize('n', [1, 2, 5, 30])
def test_median_is_numpys(n):
    x = np.random.default_rng(n).normal(size=(3, 4, n))
    assert_allclose(fast_median(x, axis=-1), np.median(x, axis=-1), rtol=1e-15)
    assert_allclose(fast_median(x, axis=0), np.median(x, axis=0), rtol=1e-15)


# plots

def test_pair_plot_draws_every_score_in_its_place(table):
    figure, ax = plt.subplots()
    assert plot_pairs(table, 'mask-fisher', 128, ax) is ax and len(plt.get_fignums()) == 1
    ticks = [[o.get_text() for o in axis.get_ticklabels()] for axis in (ax.yaxis, ax.xaxis)]
    assert ticks == [['mnli', 'qqp', 'mrpc †', 'rte']]*2
    runs = [slow_scores('mask-fisher', 2, 128, s) for s in range(3)]
    tasks = list(TASKS)
    values = ax.collections[0].get_array().reshape(4, 4)
    for i, task in enumerate(tasks):
        for j, partner in enumerate(tasks):
            if i == j: assert values.mask[i, i]; continue
            group = '+'.join(tasks[k] for k in sorted((i, j)))
            assert_allclose(values[i, j], statistics.fmean(r[group][task] for r in runs), rtol=1e-12)
    pairs = table[table.group_size == 2].normalised
    assert_allclose(ax.collections[0].get_clim(), [pairs.min(), pairs.max()], rtol=1e-12)
    assert ax.get_title() == 'mask-fisher, N=128' and ax.get_ylabel() and ax.get_xlabel()


@pytest.mark.parametrize('size', [2, 3, 4])
def test_score_plot_draws_every_score(table, size):
    settings = [('average', None), ('mask-fisher', 128)]
    ax = plot_scores(table, settings, size)
    points = np.concatenate([o.get_offsets() for o in ax.collections])
    for y, (name, n) in enumerate(settings):
        runs = [slow_scores(name, size, n, s) for s in ([None] if n is None else [0] if size > 2 else range(3))]
        expected = [statistics.fmean(r[g][t] for r in runs) for g in runs[0] for t in g.split('+')]
        assert_allclose(sorted(points[np.abs(points[:, 1]-y) < .5][:, 0]), sorted(expected), rtol=1e-12)
        assert_allclose(ax.lines[y].get_xdata(), statistics.fmean(statistics.median(flat(r)) for r in runs), rtol=1e-12)
    assert [o.get_text() for o in ax.get_yticklabels()] == ['average', 'mask-fisher, N=128']
    assert [o.get_text() for o in ax.get_legend().get_texts()] == ['mnli', 'qqp', 'mrpc †', 'rte', 'median']


def test_samples_plot(table):
    ax = plot_samples(table, ['average', 'mask-fisher', 'dare'], 'mean')
    runs = {n: [statistics.fmean(flat(slow_scores('mask-fisher', 2, n, s))) for s in range(k)] for n, k in ((128, 3), (2048, 1))}
    assert_allclose(ax.lines[1].get_xydata(), [[n, statistics.fmean(v)] for n, v in runs.items()], rtol=1e-12)
    assert_allclose(sorted(ax.collections[0].get_offsets().tolist()), sorted([n, x] for n, v in runs.items() for x in v), rtol=1e-12)
    assert_allclose(ax.lines[0].get_ydata(), statistics.fmean(flat(slow_scores('average'))), rtol=1e-12)
    assert ax.get_xscale() == 'log' and [o.get_text() for o in ax.get_xticklabels()] == ['128', '2,048']
    with pytest.raises(ValueError, match='no results of ties in groups of 2'): plot_samples(table, ['ties'])


def test_error_plot(folder):
    found = load_errors(folder)
    assert len(found) == len(errors()) and found.kind.unique().tolist() == ['paper', 'released']
    ax = plot_errors(found)
    assert_allclose(ax.lines[0].get_xydata(), [[n, statistics.median([(1+i)/n*100 for i in range(4)])] for n in (128, 2048)], rtol=1e-12)
    assert ax.get_yscale() == 'log' and [o.get_text() for o in ax.get_legend().get_texts()] == ['paper', 'released']
    assert plot_errors(found, 'rows_rank').get_yscale() == 'linear'


def test_errors_are_checked(tmp_path):
    for change, message in ((dict(heads='x'), "'heads' cannot be 'x'"), (dict(reference=None), "'reference' cannot be None")):
        write(tmp_path, dict(fisher_error=dict(errors=[errors()[0] | change])))
        with pytest.raises(ValueError, match=message): load_errors(tmp_path)
    write(tmp_path, dict(fisher_error=dict(errors=[errors()[0] | dict(labels='exact')])))
    assert load_errors(tmp_path).kind.tolist() == ['paper, exact labels']


def step(**change): return dict(what='masks', seconds=2., num_examples=128, batch_tokens=4096, labels='empirical', precision=None, device='cpu',
                                model='small') | change


def test_cost(tmp_path):
    one = step(what='full', seconds=64., batch=1, precision='fp32')
    del one['batch_tokens']
    steps = load_bench(write(tmp_path, dict(a=dict(steps=[one, step()]), b=dict(steps=[step(what='grams', labels=None, batch=32, batch_tokens=None)]))))
    assert_allclose(steps.ms, [500, 15.625, 15.625], rtol=1e-12)
    assert steps.batching.tolist() == ['one at a time', '4,096 tokens a batch', '32 a batch'] and steps.file.tolist() == ['a', 'a', 'b']
    ax = plot_cost(steps)
    assert [o.get_width() for o in ax.patches] == [15.625, 15.625, 500] and ax.get_xscale() == 'linear'
    assert [o.get_text() for o in ax.get_yticklabels()][2] == 'full\none at a time, empirical labels, fp32' and 'no labels' in ax.get_yticklabels()[1].get_text()
    shared = {k: v for k, v in step().items() if k not in ('what', 'seconds', 'labels')}
    short = [dict(what='full', labels='exact', examples='batches by length', seconds=1.28)]
    again = load_bench(write(tmp_path/'shared', dict(a=shared | dict(steps=short, commit='abc'))))
    assert again.batching.tolist() == ['batches by length'] and again.ms.tolist() == [10.] and again.commit.tolist() == ['abc']
    for change, message in ((dict(seconds=0), 'no seconds'), (dict(num_examples=0), 'no examples'), (dict(what=None), "'what' cannot be None")):
        write(tmp_path, dict(c=dict(steps=[step(**change)])))
        with pytest.raises(ValueError, match=message): load_bench(tmp_path)


def test_gain_plot(table):
    summary = summarise(table, resamples=50)
    rows = summary[summary.group_size == 2].dropna(subset='gain')
    for statistic, column in (('median', 'gain'), ('mean', 'mean_gain')):
        ax = plot_gains(summary[summary.group_size == 2], statistic)
        assert_allclose(ax.collections[1].get_offsets()[:, 0], rows[column], rtol=1e-12)
        assert_allclose([o[:, 0] for o in ax.collections[0].get_segments()], rows[[f'{column}_low', f'{column}_high']], rtol=1e-12)
    assert [o.get_text() for o in ax.get_yticklabels()] == ['mask-fisher, N=128', 'mask-fisher, N=2,048', 'dare', 'change-x, N=128']


def fisher(layers, scale=1., seed=0, ragged=False):
    torch.manual_seed(seed)
    sizes = [(4-i % 2, 50+i) if ragged else (4, 50) for i in range(layers)]
    made = [(scale*torch.rand(h)+scale/9, scale*torch.rand(d)+scale/9) for h, d in sizes]
    parts = [tuple(o) if ragged else torch.stack(o) for o in zip(*made)]
    return MaskFisher(*parts, num_examples=8)


@pytest.mark.parametrize('ragged', [False, True])
def test_head_plot_draws_every_head_in_its_place(ragged):
    one = fisher(3, ragged=ragged)
    ax = plot_heads(one, 'mnli')
    drawn = ax.collections[0].get_array()
    for i, heads in enumerate(one.heads):
        assert_allclose(drawn[i, :len(heads)], heads.numpy(), rtol=1e-6)
        assert drawn.mask[i].tolist() == [False]*len(heads)+[True]*(4-len(heads)) if ragged else not np.ma.getmaskarray(drawn)[i].any()
    assert ax.get_title() == 'Heads: mnli' and ax.get_ylim() == (0, 3) and ax.figure.axes[1].get_ylabel().startswith('Fisher information')
    figure, axes = plt.subplots(1, 2)
    assert plot_heads(one, ax=axes[1], bar=False) is axes[1] and len(figure.axes) == 2


def test_heads_of_two_models_share_a_scale():
    fishers = dict(a=fisher(2), b=fisher(2, 1e4, 1))
    norm = plots.shared_scale(fishers)
    assert_allclose([norm.vmin, norm.vmax], [fishers['a'].heads.min(), fishers['b'].heads.max()], rtol=1e-6)
    colors = [plot_heads(o, norm=norm).collections[0] for o in fishers.values()]
    [o.update_scalarmappable() for o in colors]
    assert colors[0].get_facecolors()[:, :3].max(0).tolist() != colors[1].get_facecolors()[:, :3].max(0).tolist()
    fishers['a'].heads.zero_()
    assert plots.shared_scale(fishers).vmin == fishers['b'].heads.min()
    fishers['b'].heads.zero_()
    with pytest.raises(ValueError, match=r"every head Fisher of \['a', 'b'\] is zero"): plots.shared_scale(fishers)


@pytest.mark.parametrize('ragged', [False, True])
def test_row_plot_is_of_every_row(ragged):
    fishers = dict(a=fisher(3, ragged=ragged), b=fisher(3, 10., 1, ragged))
    table = plots.row_table(fishers)
    assert len(table) == sum(len(o) for f in fishers.values() for o in f.rows)
    assert_allclose(table[(table.task == 'b') & (table.layer == '1')].fisher, fishers['b'].rows[1].numpy(), rtol=1e-6)
    figure, ax = plt.subplots()
    assert plot_rows(fishers, ax) is ax and ax.get_xscale() == 'log' and ax.get_title() == 'FFN rows'
    assert [o.get_text() for o in ax.get_yticklabels()] == ['0', '1', '2'] and ax.get_ylim()[0] < ax.get_ylim()[1]
    zero = MaskFisher(torch.ones(2, 4), torch.zeros(2, 5))
    with pytest.raises(ValueError, match=r"every row Fisher of \['a'\] is zero"): plot_rows(dict(a=zero))


# what cannot be drawn

FISHERS = {  # what is given, what is said
    'list': ([], TypeError, 'must be a mapping from task, got list'), 'empty': ({}, ValueError, '`fishers` is empty'),
    'number': (dict(a=fisher(2), b=3), TypeError, "Fisher of 'b' must be a MaskFisher, got int"),
    'nan': (dict(b=MaskFisher(torch.tensor([[1., torch.nan]]), torch.ones(1, 3)), a=fisher(2)), ValueError, "'b', heads of layer 0: node 1 is nan"),
    'nan row': (dict(a=MaskFisher(torch.ones(1, 2), torch.tensor([[1., torch.nan]]))), ValueError, "'a', rows of layer 0: node 1 is nan"),
    'infinite': (dict(a=MaskFisher(torch.ones(1, 2), torch.tensor([[1., torch.inf]]))), ValueError, 'node 1 is inf'),
    'negative': (dict(a=MaskFisher(-torch.ones(1, 2), torch.ones(1, 3))), ValueError, 'node 0 is -1.0'),
    'no layers': (dict(a=MaskFisher(torch.ones(0, 2), torch.ones(0, 3))), ValueError, "'a' has no layers"),
}


@pytest.mark.parametrize('draw', [plot_rows, plot_winners, lambda o: plots.compare_heads(range(len(o)), o)], ids=['rows', 'winners', 'heads'])
@pytest.mark.parametrize('case', FISHERS)
def test_fishers_that_cannot_be_drawn_are_refused(case, draw):
    given, kind, message = FISHERS[case]
    with pytest.raises(kind) as e: draw(given)
    assert message in str(e.value) and not plt.get_fignums()


def test_one_fisher_that_cannot_be_drawn_is_refused():
    for o, kind in ((3, TypeError), (FISHERS['nan'][0]['b'], ValueError)):
        with pytest.raises(kind, match="of 'b'"): plot_heads(o, 'b')
        with pytest.raises(kind, match="of 'b'"): plot_heads(o, 'b', norm=plots.shared_scale(dict(a=fisher(2))))
    with pytest.raises(ValueError, match='3 axes for the 1 Fishers'): plots.compare_heads(plt.subplots(1, 3)[1], dict(a=fisher(2)))
    with pytest.raises(ValueError, match='among at least two tasks, got one'): plot_winners(dict(a=fisher(2)))
    with pytest.raises(ValueError, match="'b', heads of layer 0: shape"): plot_winners(dict(a=fisher(2), b=MaskFisher(torch.ones(2, 3), torch.ones(2, 50))))
    for weights, message in ((dict(a=np.nan), 'must be a finite number'), (dict(a=-1), 'not negative'), (dict(c=1), r"no Fisher of \['c'\]")):
        with pytest.raises(ValueError, match=message): plot_winners(dict(a=fisher(2), b=fisher(2)), weights)


def test_an_axis_is_one_axis():
    for ax in (plt.subplots(1, 2)[1], plt.figure(), 3):
        with pytest.raises(TypeError, match='`ax` must be one `matplotlib` axis'): plot_heads(fisher(2), ax=ax)


DRAWN = {  # a column that each needs with numbers, and how it is called
    'choose': (None, lambda o: choose(o, 'average')), 'pairs': ('normalised', lambda o: plot_pairs(o, 'average')),
    'scores': ('normalised', lambda o: plot_scores(o, [('average', None)])), 'samples': ('normalised', lambda o: plot_samples(o, ['average'])),
    'gains': (None, plot_gains), 'errors': ('heads', plot_errors), 'cost': ('ms', plot_cost)}


def whole(name, table, folder):
    if name == 'cost': return pd.DataFrame([step(ms=1., batching='one at a time')])
    return dict(gains=summarise(table, resamples=10), errors=load_errors(folder)).get(name, table)


@pytest.mark.parametrize('name', DRAWN)
def test_tables_that_cannot_be_drawn_are_refused(name, table, folder):
    column, draw = DRAWN[name]
    good = whole(name, table, folder)
    draw(good)
    plt.close('all')
    for bad in ([], None, 'average', {}):
        with pytest.raises(TypeError, match=f'expected a table of `.*`, got {type(bad).__name__}'): draw(bad)
    with pytest.raises(ValueError, match='has no rows'): draw(good[:0])
    needed = column or dict(choose='group_size', gains='gain_low')[name]
    with pytest.raises(ValueError, match=f"has a column '{needed}', this one has"): draw(good.drop(columns=needed))
    if column:
        with pytest.raises(ValueError, match=f"column '{column}' of this table of `load_.*` holds NaN"): draw(good.assign(**{column: np.nan}))
    assert not plt.get_fignums()


def test_choices_that_cannot_be_drawn_are_refused(table, folder):
    for call, kind, message in (
            (lambda: choose(table, 'average', '128'), TypeError, "`num_samples` must be an int or None, got '128'"),
            (lambda: choose(table, 'ties'), ValueError, 'no results of ties in groups of 2; there are average; '),
            (lambda: choose(table, 'average', group_size=7), ValueError, 'there are groups of 2; groups of 3; groups of 4'),
            (lambda: plot_pairs(table[table.group_size == 3], 'average'), ValueError, 'in groups of 2; there are groups of 3'),
            (lambda: plot_scores(table, []), ValueError, '`settings` is empty'), (lambda: plot_samples(table, []), ValueError, '`names` is empty'),
            (lambda: plot_samples(table, 'average'), TypeError, "must be a list of methods, got 'average'"),
            (lambda: plot_scores(table, 'average'), TypeError, 'must be a list of pairs of a method and N'),
            (lambda: plot_scores(table, ['average']), ValueError, "'average' is no pair of a method and N"),
            (lambda: plot_samples(table, ['average'], 'sd'), ValueError, "`statistic` is 'sd'; expected one of median, mean, min"),
            (lambda: plot_gains(summarise(table, resamples=10), 'min'), ValueError, "`statistic` is 'min'; expected one of median, mean"),
            (lambda: plot_errors(load_errors(folder), 'tails'), ValueError, "`part` is 'tails'; expected one of heads, rows"),
            (lambda: plot_gains(summarise(table, 'nothing', resamples=10), baseline='nothing'), ValueError, 'has a gain over nothing')):
        with pytest.raises(kind) as e: call()
        assert message in str(e.value), str(e.value)
    assert not plt.get_fignums()


# report

def test_report(folder, tmp_path, table):
    summary = report(folder)
    pd.testing.assert_frame_equal(summary, summarise(table))
    state = plt.get_fignums(), matplotlib.get_backend()
    report(folder, tmp_path/'out')
    assert (plt.get_fignums(), matplotlib.get_backend()) == state
    text = (tmp_path/'out'/'report.md').read_text(encoding='utf-8')
    plots = {o.name for o in (tmp_path/'out').glob('*.png')}
    assert plots == {f'report-{o}.png' for o in (*(f'{p}-k{k}' for p in ('scores', 'gains', 'samples') for k in (2, 3, 4)), 'pairs-average',
                                                 'pairs-mask-fisher', 'pairs-dare', 'error-heads', 'error-rows')}
    assert all(f']({o})' in text for o in plots) and 'most frequent class: mrpc.' in text and '## Merges of 4' in text
    for o in plots: assert plt.imread(tmp_path/'out'/o).std() > .02
    with pytest.raises(OutputExistsError): report(folder, tmp_path/'out')
    (tmp_path/'out'/'report-mine.png').touch()
    report(write(tmp_path/'in', dict(own=own(), a=result('average'))), tmp_path/'out', overwrite=True)
    assert {o.name for o in (tmp_path/'out').glob('*.png')} == {'report-mine.png', 'report-pairs-average.png', 'report-scores-k2.png', 'report-samples-k2.png'}
    (tmp_path/'out'/'report.md').write_text(text)
    with pytest.raises(OutputExistsError, match='report.md is not as'): report(folder, tmp_path/'out', overwrite=True)


def test_a_report_without_a_list_is_known_by_its_page(tmp_path, folder):
    out, few = tmp_path/'out', write(tmp_path/'in', dict(own=own(), a=result('average')))
    report(few, out)
    (out/'report.json').unlink()
    (out/'report-mine.png').touch()
    report(few, out, overwrite=True)
    assert (out/'report-mine.png').exists() and (out/'report.json').exists()
    (out/'report.json').unlink()
    (out/'report.md').write_text('what I think')
    with pytest.raises(OutputExistsError, match='is there and not from'): report(few, out, overwrite=True)
    assert (out/'report.md').read_text() == 'what I think' and len(list(out.glob('*.png'))) > 1


def test_each_plot_is_of_its_own_setting(table):
    summary = summarise(table, resamples=10)
    plots = {name: draw for name, _, draw in list(module._plots(table, summary, None))}
    titles = {name: draw(ax=plt.subplots()[1]).get_title() for name, draw in plots.items()}
    assert titles['pairs-average'] == 'average' and titles['pairs-mask-fisher'] == 'mask-fisher, N=128' and titles['pairs-dare'] == 'dare'
    assert [titles[f'scores-k{k}'] for k in (2, 3, 4)] == [f'Every task of every merge of {k}' for k in (2, 3, 4)]


def test_a_failed_report_leaves_nothing(folder, tmp_path, monkeypatch):
    def broken(*args): raise RuntimeError('no ink')
    monkeypatch.setattr(module, 'save_plot', broken)
    with pytest.raises(RuntimeError, match='no ink'): report(folder, tmp_path/'out')
    assert not (tmp_path/'out').exists()


def test_a_name_cannot_leave_the_folder(tmp_path):
    runs = {f'a{i}': deepcopy(o) | dict(name='../up', merge={}) for i, o in enumerate([result('average')])}
    report(write(tmp_path/'in', runs | dict(own=own())), tmp_path/'out'/'deep')
    assert sorted(o.name for o in (tmp_path/'out').iterdir()) == ['deep'] and (tmp_path/'out'/'deep'/'report-pairs-..-up.png').exists()


@pytest.mark.parametrize('module', [reading, intervals, plots, module], ids=lambda o: o.__name__)
def test_plotting_is_imported_late(module):
    tree = ast.parse(Path(module.__file__).read_text(encoding='utf-8'))
    top = [o for o in tree.body if isinstance(o, (ast.Import, ast.ImportFrom))]
    names = {a.name.partition('.')[0] for o in top if isinstance(o, ast.Import) for a in o.names} | {o.module.partition('.')[0] for o in top if isinstance(o, ast.ImportFrom)}
    assert not names & {'pandas', 'seaborn', 'matplotlib', 'scipy'}
