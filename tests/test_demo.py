"""The folder that the demo leaves, here the small one of tools/small_demo.py: its rows, its merge through plain transformers, its recipe."""
import csv
import json

import pytest
from demo_case import needs_demo, put_demo, weights
from transformers import pipeline

from fisher_nodes import load_task
from fisher_nodes.app.cli import main
from fisher_nodes.app.demo import DEMO_FILES, corpora, held_out

pytestmark = needs_demo
FIXED = dict(
    topics=['Oil prices rose after OPEC cut its output', 'The company reported a quarterly profit of 12 mln dlrs',
        'shareholders approved the merger of the two companies', 'the bid for the company was raised to 30 dlrs a share'],
    author=['Make America great again!', 'Crooked media! Sad!', 'We need to raise the minimum wage and invest in families',
        'Every child deserves health care.'])

@pytest.fixture
def demo(tmp_path):
    put_demo(tmp_path)
    return tmp_path/'_demo'

def test_it_leaves_what_it_says(demo):
    assert sorted(o.name for o in demo.iterdir())==sorted(DEMO_FILES)
    assert json.loads((demo/'demo.json').read_text())['reload_equal'] is True

def test_rows_in_files_are_those_of_the_corpora(demo):
    "Every text and label, in order; and no text that is scored was trained on."
    size = json.loads((demo/'demo.json').read_text())['settings']['test_samples']
    for name,corpus in corpora().items():
        for part,rows in dict(train=corpus.train, test=held_out(corpus, size)).items():
            path = demo/f'{name}-{part}.csv'
            assert load_task(path)[0]['text'][:]==rows['text'][:]
            with open(path, newline='', encoding='utf-8') as file: words = [o['label'] for o in csv.DictReader(file)]
            assert words==rows.features['label'].int2str(rows['label'][:])
        assert not set(corpus.train['text'][:]) & set(corpus.test['text'][:])

@pytest.mark.parametrize('task', FIXED)
def test_plain_transformers_answer_as_the_own_model(demo, task):
    "Four sentences a task, through `pipeline`, from the merge that the demo saved; and not all by one word."
    own, both = [[o['label'] for o in pipeline('text-classification', model=str(demo/o))(FIXED[task])] for o in (task, f'merged/{task}')]
    assert both==own and len(set(own))>1

def test_its_recipe_repeats_it_to_the_bit(demo, tmp_path, capsys):
    assert main(['merge', str(demo/'merged'/'recipe.yml'), '--out', str(tmp_path/'again')])==0
    assert weights(tmp_path/'again')==weights(demo/'merged') and weights(tmp_path/'again')
