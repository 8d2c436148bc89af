"The explorer: what it computes is what `merge` and `evaluate` give, what cannot be is told, and it works in a browser."
import importlib.util
import json
import os
import re
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import torch
from browser import CHROMIUM, chromium
from explorer_case import case, fisher
from reference import ragged_batches, tiny

from fisher_nodes import METHODS, SCHEMES, MaskFisher, evaluate, merge
from fisher_nodes.engine.fingerprints import hash_weights
from fisher_nodes.app.explorer import (
    COMPARED, Explorer, View, as_code, choice_table, draw_panel, explore, head_shares, merge_choice,
    score_choice, tried_table, winners)

TESTS = Path(__file__).resolve().parent

@pytest.fixture(scope='module')
def given(): return case(('red', 'blue', 'green'))

@pytest.fixture
def explorer(given): return Explorer(*given)

def accuracy(merged, validation): return {t: evaluate(m, validation[t], progress=False)['accuracy'] for t,m in merged.items()}


# --- what is computed -----------------------------------------------------------------------

@pytest.mark.parametrize('scheme', SCHEMES)
@pytest.mark.parametrize('weights', [None, dict(red=.05), dict(red=0, blue=.3)], ids=['ones', 'little', 'none'])
def test_shares_are_what_query_rows_move_by(given, scheme, weights):
    "Where each head's query ends up between two models is the share that is shown."
    fishers, models, _ = given
    two = {t: models[t] for t in ('red', 'blue')}
    fishers = {t: fishers[t] for t in two}
    full = {t: (weights or {}).get(t, 1.) for t in two}
    merged = merge(two, fishers, weights=full, scheme=scheme)
    for i,shares in enumerate(head_shares(fishers, weights, scheme)):
        a, b, m = (o.encoder.layer[i].attention.self.query.weight.view(4, -1) for o in (two['red'].bert, two['blue'].bert, merged.body))
        torch.testing.assert_close(((m-b)/(a-b)).mean(1), shares[0].expand(4), rtol=1e-9, atol=1e-9)

def test_winner_has_the_largest_product():
    "Against a loop in plain numbers."
    fishers, λ = {t: fisher(i) for i,t in enumerate('abc')}, dict(a=.3, b=1, c=.7)
    who, share = winners(head_shares(fishers, λ))
    for i in range(2):
        for h in range(4):
            products = [λ[t]*f.heads[i,h].item() for t,f in fishers.items()]
            assert who[i,h]==int(np.argmax(products))
            np.testing.assert_allclose(share[i,h], max(products)/sum(products), rtol=1e-12)

def test_merge_is_that_of_merge(given, explorer):
    fishers, models, _ = given
    choice = explorer.choice(['red', 'green'], dict(green=.35), 'with-value')
    two = {t: models[t] for t in ('red', 'green')}
    want = merge(two, {t: fishers[t] for t in two}, weights=dict(red=1, green=.35), scheme='with-value')
    for ours in (merge_choice(explorer, choice), eval(as_code(choice, list(models)), dict(merge=merge, models=models, fishers=fishers))):
        assert list(ours)==list(want)
        for n,t in want.body.state_dict().items(): assert torch.equal(ours.body.state_dict()[n], t)

def test_scores_are_those_of_the_three_that_are_compared(given, explorer):
    fishers, models, validation = given
    before = {t: (hash_weights(m), m.training, [p.requires_grad for p in m.parameters()]) for t,m in models.items()}
    scores = score_choice(explorer, explorer.choice(weights=dict(red=.1)))
    assert scores['own model']==dict(red=1, blue=1, green=1)
    assert scores['plain average']==accuracy(merge(models, method='average'), validation)
    assert scores['this merge']==accuracy(merge(models, fishers, weights=dict(red=.1, blue=1, green=1)), validation)
    assert scores['this merge']!=scores['plain average']
    assert before=={t: (hash_weights(m), m.training, [p.requires_grad for p in m.parameters()]) for t,m in models.items()}

@pytest.mark.parametrize('tasks', [None, ['red', 'blue']])
def test_every_score_is_reported_before_it_is_computed(explorer, tasks):
    choice, said = explorer.choice(tasks), []
    scores = score_choice(explorer, choice, lambda i,n,what: said.append((i, n, what.partition(':')[0])))
    assert said==[(i, 3*len(choice.tasks), row) for i,row in enumerate(row for row in COMPARED for _ in choice.tasks)]
    assert {row: list(o) for row,o in scores.items()}=={row: list(choice.tasks) for row in COMPARED}

def test_after_a_failure_the_next_run_is_whole(explorer):
    def fail(i, *_):
        if i==4: raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt): score_choice(explorer, explorer.choice(), fail)
    scores = score_choice(explorer, explorer.choice())
    assert scores==score_choice(explorer, explorer.choice()) and not np.isnan([*map(list, (o.values() for o in scores.values()))]).any()

def test_batches_and_slices(given):
    fishers, models, validation = given
    batches = {t: iter(ragged_batches()) for t in models} # can be read once
    explorer = Explorer(fishers, models, batches, num_samples=5)
    scores = score_choice(explorer, explorer.choice(['red', 'blue']))
    assert scores['own model']=={t: evaluate(models[t], ragged_batches())['accuracy'] for t in ('red', 'blue')}
    assert len(Explorer(fishers, models, validation, num_samples=5).rows['red'])==5
    assert len(Explorer(fishers, models, validation, num_samples=None).rows['red'])==60

def test_table(explorer):
    table = choice_table(explorer, score_choice(explorer, explorer.choice(['red', 'blue'])))
    assert list(table)==['red, accuracy', 'blue, accuracy', 'mean, % of own'] and list(table.index)==list(COMPARED)
    np.testing.assert_allclose(table.iloc[:,2], table.iloc[:,:2].mean(axis=1), rtol=1e-12) # own scores are 100


# --- what is refused ------------------------------------------------------------------------

def test_what_does_not_fit_is_refused_before_anything_is_shown(given, tmp_path):
    fishers, models, validation = given
    (tmp_path/'no.safetensors').write_bytes(b'no')
    wide = fisher(0, heads=5)
    other = MaskFisher(fishers['red'].heads, fishers['red'].rows, 8, dict(weight_hash='0'*16))
    nan = MaskFisher(fishers['red'].heads*np.nan, fishers['red'].rows)
    for say,args in {"Fisher of 'blue', heads of layer 0: shape (5,), expected (4,)": (fishers | dict(blue=wide),),
                     "layer 0: shape (5,), expected (4,)": ({t: wide for t in models}, models),
                     "'red' was measured on other weights": (fishers | dict(red=other), models),
                     'node 0 is nan': (fishers | dict(red=nan),),
                     'is not a saved MaskFisher': (fishers | dict(red=tmp_path/'no.safetensors'),),
                     "at least two tasks, got ['red']": (dict(red=fishers['red']),),
                     "missing ['green'], not among them ['grey']": (fishers, {t: models[t] for t in ('red', 'blue')} | dict(grey=models['red'])),
                     "`validation` must have an entry for each": (fishers, models, dict(red=validation['red'])),
                     'given without `models`': (fishers, None, validation),
                     'hidden_size is 16 in': (fishers, models | dict(green=tiny(hidden=32)))}.items():
        with pytest.raises(ValueError, match=re.escape(say)): explore(*args)
    with pytest.raises(FileNotFoundError, match='is not a file'): explore(fishers | dict(red=tmp_path/'none'))
    with pytest.raises(TypeError, match='must be a mapping'): explore(list(fishers.values()))
    with pytest.raises(TypeError, match="'red' must be a MaskFisher, got int"): explore(fishers | dict(red=1))
    with pytest.raises(ValueError, match='has 2 labels'): explore(fishers, models, validation, tasks=dict(red='rte'))

def test_a_failure_while_scoring_is_one_line(given):
    fishers, models, validation = given
    bad = validation['blue'].remove_columns('label').add_column('label', [7]*60)
    view = View(Explorer(fishers, models, validation | dict(blue=bad)))
    view.pressed()
    assert re.search(r'ValueError: label 7 of row', view.status.value) and '\n' not in view.status.value
    assert not view.button.disabled and view.tried==[]
    view.on['blue'].value = False
    view.pressed()
    assert 'Scored' in view.status.value

def test_models_that_differ_in_variant_are_told(given):
    fishers, models, validation = given
    marked = {t: MaskFisher(f.heads, f.rows, 8, dict(variant='released' if t=='red' else 'paper')) for t,f in fishers.items()}
    view = View(Explorer(marked, models, validation))
    view.pressed()
    assert 'the Fishers differ in variant' in view.status.value

def test_text_is_escaped():
    names = {'<b>x</b>': fisher(0), 'a & b': fisher(1)}
    view = View(Explorer(names))
    shown = ' '.join(o.value for o in (*view.panels.values(), view.status, view.code))
    assert '<b>x' not in shown and '&lt;b&gt;x' in shown


# --- the widgets without a browser ----------------------------------------------------------

def test_only_what_changed_is_drawn(given, monkeypatch):
    from fisher_nodes.app import explorer as module
    drawn = []
    monkeypatch.setattr(module, 'panel_html', lambda panel,fishers,choice: drawn.append(panel) or f'{panel} {choice}')
    view = View(Explorer(given[0]))
    everything = ['heads', 'neurons', 'winners']
    assert sorted(drawn)==everything
    for act, want in ((lambda: setattr(view.λ['red'], 'value', .5), ['winners']), (lambda: setattr(view.scheme, 'value', 'heads'), ['winners']),
                      (lambda: setattr(view.λ['red'], 'value', 1.), ['winners']),
                      (lambda: setattr(view.on['red'], 'value', False), everything), (lambda: setattr(view.on['blue'], 'value', False), []),
                      (lambda: setattr(view.on['red'], 'value', True), everything), (lambda: setattr(view.on['blue'], 'value', True), everything)):
        drawn.clear()
        act()
        assert sorted(drawn)==want

def test_no_scores_of_another_choice_are_shown(given):
    view = View(Explorer(*given))
    for act in (lambda: setattr(view.λ['red'], 'value', .5), lambda: setattr(view.scheme, 'value', 'heads'), lambda: setattr(view.on['red'], 'value', False)):
        view.pressed()
        assert 'Scored on up to 60 rows' in view.status.value and 'this merge' in view.table.value
        act()
        assert 'not scored yet' in view.status.value and view.table.value==''

def test_progress_is_shown_and_the_button_waits(given):
    view, seen = View(Explorer(*given)), []
    view.status.observe(lambda change: seen.append((view.button.disabled, view.sweep.disabled, change.new)), 'value')
    view.pressed()
    steps = [o for o in seen if ' of 9: ' in o[2]]
    assert [(*o[:2], f'>{i+1} of 9: ' in o[2]) for i,o in enumerate(steps)]==[(True, True, True)]*9
    assert 'plain average: scoring blue on 60 rows' in steps[4][2]
    assert not view.button.disabled and not view.sweep.disabled

def test_what_was_tried_is_kept_whatever_is_changed(given):
    "A table and a point for every trial, with the scores of `merge`; of a task that a trial left out, none."
    fishers, models, validation = given
    view = View(Explorer(*given))
    view.swept()
    view.on['green'].value = False
    view.method.value = 'average'
    assert view.scheme.disabled
    view.pressed()
    assert [len(o.scores) for o in view.tried]==[3]*5+[2] and 'Scores of 6 merges' in view.points.value
    for trial,λ in zip(view.tried, (1/16, 1/4, 1, 4, 16)):
        assert trial.scores==accuracy(merge(models, fishers, weights=dict(red=λ, blue=1., green=1.)), validation)
    assert view.tried[5].scores==accuracy(merge({t: models[t] for t in ('red', 'blue')}, method='average'), validation)
    table = tried_table(view.tried, view.own)
    assert list(table.index)==[1, 2, 3, 4, 5, 6] and list(table.method)==['mask-fisher']*5+['average'] and np.isnan(table.green[6])
    np.testing.assert_allclose(table['mean, % of own'][6], (table.red[6]+table.blue[6])/2, rtol=1e-12) # own scores are 100
    assert view.kept.value.count('<tr')==7 and '–' in view.kept.value

def test_methods_are_those_that_can_be(given):
    "Each is what `merge` gives; one that lacks something is not offered, and is told if it is asked for."
    fishers, models, validation = given
    base, data = tiny(num_labels=3, seed=9), {t: o.remove_columns('label') for t,o in validation.items()}
    assert Explorer(fishers).methods()==['mask-fisher'] and Explorer(*given).methods()==['mask-fisher', 'average']
    assert {'ties', 'dare'}<=set(Explorer(*given, base=base).methods()) and 'regmean' in Explorer(*given, data=data).methods()
    whole = Explorer(*given, data=data, data_samples=8, base=base)
    assert sorted(whole.methods())==sorted(METHODS)
    for method in ('ties', 'regmean'):
        choice = whole.choice(method=method)
        named = dict(merge=merge, models=models, base=base, data=data)
        want = eval(as_code(choice, list(models), 8), named)
        for n,t in merge_choice(whole, choice).body.state_dict().items(): assert torch.equal(t, want.body.state_dict()[n])
    with pytest.raises(ValueError, match='base'): merge_choice(Explorer(*given), whole.choice(method='ties'))

def test_no_bars_while_models_are_loaded(given, tmp_path, capfd):
    from transformers.utils import logging
    logging.enable_progress_bar()
    fishers, models, _ = given
    for t,m in models.items(): m.save_pretrained(tmp_path/t)
    capfd.readouterr()
    Explorer(fishers, {t: tmp_path/t for t in models})
    assert '%' not in capfd.readouterr().err and logging.is_progress_bar_enabled()

def test_sliders_report_when_let_go_and_can_be_logarithmic(given):
    for log in (False, True):
        view = View(Explorer(given[0]), log=log)
        assert not any(o.continuous_update for o in view.λ.values())
        view.λ['red'].value = .1
        assert abs(view.choice().λ['red']-.1)<1e-12

def test_a_box_without_models_has_no_button(given):
    def buttons(o): return [type(o).__name__]+[b for c in getattr(o, 'children', ()) for b in buttons(c)]
    assert 'Button' not in buttons(explore(given[0])) and 'Button' in buttons(explore(*given))

def test_pyplot_is_left_alone(given, explorer):
    from matplotlib import pyplot as plt
    plt.close('all')
    for panel in ('heads', 'winners', 'neurons'): draw_panel(panel, given[0], explorer.choice())
    assert plt.get_fignums()==[]

@pytest.mark.parametrize('tasks', [2, 6, 11])
def test_any_number_of_tasks_is_drawn(tasks):
    fishers = {f't{i}': fisher(i) for i in range(tasks)}
    shown = [o.value for o in View(Explorer(fishers)).panels.values()]
    assert all(o.startswith('<img alt=') for o in shown), shown

def test_layers_of_different_width_are_drawn():
    fishers = {t: MaskFisher((torch.rand(4), torch.rand(2)), (torch.rand(8), torch.rand(6))) for t in 'ab'}
    assert all(o.value.startswith('<img alt=') for o in View(Explorer(fishers)).panels.values())


# --- a browser ------------------------------------------------------------------------------

PATIENCE = int(os.environ.get('FISHER_NODES_BROWSER_SECONDS', 120)) # for any one step in a browser
SERVERS = dict(voila=('app.ipynb',), jupyterlab=('--ServerApp.root_dir=.', '--IdentityProvider.token=', '--allow-root', '--LabApp.news_url=None'))
PATHS = dict(voila='', jupyterlab='/lab/tree/app.ipynb') # where the notebook is
NOTEBOOK = '''import sys
sys.path.insert(0, {tests!r})
from explorer_case import case
from fisher_nodes.app.explorer import explore
explore(*case())'''

def notebook(path):
    "A notebook of one cell that calls `explore`."
    cell = dict(cell_type='code', execution_count=None, id='explore', metadata={}, outputs=[], source=NOTEBOOK.format(tests=str(TESTS)))
    spec = dict(display_name='Python 3', language='python', name='python3')
    path.write_text(json.dumps(dict(cells=[cell], metadata=dict(kernelspec=spec), nbformat=4, nbformat_minor=5)))

def free_port():
    with socket.socket() as s: s.bind(('127.0.0.1', 0)); return s.getsockname()[1]

def answers(url):
    try: return urllib.request.urlopen(url, timeout=5).status==200
    except OSError: return False

def skip_without(*modules):
    missing = [o for o in (*modules, 'ipykernel', 'playwright') if importlib.util.find_spec(o) is None] + ['chromium']*(CHROMIUM is None)
    if missing: pytest.skip(f'not installed: {", ".join(missing)} (pip install {" ".join(modules)} ipykernel playwright; apt install chromium)')

@pytest.fixture(params=SERVERS)
def server(request, tmp_path):
    "The name and the address of a Voilà, then of a JupyterLab, that serves the notebook."
    skip_without(name := request.param)
    notebook(tmp_path/'app.ipynb')
    url, log = f'http://127.0.0.1:{(port:=free_port())}', open(tmp_path/'log', 'w')
    homes = {o: str(tmp_path/o) for o in ('JUPYTER_CONFIG_DIR', 'JUPYTER_RUNTIME_DIR', 'JUPYTERLAB_SETTINGS_DIR', 'JUPYTERLAB_WORKSPACES_DIR')}
    process = subprocess.Popen([sys.executable, '-m', name, *SERVERS[name], '--no-browser', f'--port={port}'],
        stdout=log, stderr=log, cwd=tmp_path, env=os.environ | homes | dict(OMP_NUM_THREADS='1'))
    try:
        until = time.time()+PATIENCE
        while not answers(url+('/voila/static/voila.js' if name=='voila' else '/api')):
            if process.poll() is not None or time.time()>until: raise RuntimeError((tmp_path/'log').read_text()[-2000:])
            time.sleep(.2)
        yield name, url
    finally:
        process.terminate()
        process.wait(60)
        log.close()

@pytest.fixture
def page(server):
    "The explorer in Chromium; errors of the page fail the test."
    (name, url), errors = server, []
    with chromium() as browser:
        page = browser.new_page(viewport=dict(width=1200, height=1500))
        page.set_default_timeout(1000*PATIENCE)
        page.on('pageerror', lambda e: errors.append(str(e)))
        page.route('**/*', lambda o: o.continue_() if o.request.url.startswith((url, 'data:')) else o.abort())
        page.goto(url+PATHS[name], wait_until='commit')
        if name=='jupyterlab': run_cell(page)
        yield page
        assert errors==[]

def run_cell(page):
    "Run the one cell of a notebook in JupyterLab, as soon as its kernel is there."
    page.get_by_text('Python 3 (ipykernel) | Idle').wait_for()
    page.locator('.jp-Notebook .jp-Cell').click()
    page.keyboard.press('Shift+Enter')

def percent(scores): return [f'{100*scores[t]:.1f}' for t in scores]

def test_in_a_browser(page):
    "Press the button, move λ, change the scheme: pictures, table and status follow, with the numbers of `merge` and `evaluate`."
    fishers, models, validation = case()
    table, button, won = page.locator('table.fisher-scores'), page.get_by_role('button', name='Score this merge'), page.locator('img[alt^="Heads won"]')
    def row(i): return table.locator('tbody tr').nth(i).locator('td').all_inner_texts()[:2]
    def say(text): page.locator('span[role=status]').filter(has_text=text).wait_for()
    def expected(**kw): return percent(accuracy(merge(models, None if 'method' in kw else fishers, **kw), validation))

    say('not scored yet')
    first = won.get_attribute('alt')
    assert table.count()==0 and won.evaluate('o => o.naturalWidth')>100
    button.click()
    say('Scored on up to 60 rows')
    assert [row(0), row(1), row(2)]==[['100.0', '100.0'], expected(method='average'), expected()]

    handle = page.locator('.noUi-handle').first
    for _ in range(8): handle.press('ArrowLeft')
    λ = float(page.locator('.widget-readout').first.inner_text())
    assert 0<λ<1
    page.locator('.widget-html code').filter(has_text=f"'red': {λ}").wait_for()
    say('not scored yet')
    second = won.get_attribute('alt')
    assert second!=first and table.count()==0
    page.locator('.widget-dropdown select').last.select_option('rows')
    page.locator('img[alt="Heads won: red 0, blue 8; ties 0"]').wait_for()
    button.click()
    say('Scored on up to 60 rows')
    assert row(2)==expected(weights=dict(red=λ, blue=1.), scheme='rows')

    page.locator('.widget-checkbox input').first.uncheck()
    say('choose at least two tasks')
    assert button.is_disabled() and won.count()==0
