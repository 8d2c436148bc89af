"""Install `fisher_nodes`; every fact about the package is read from `settings.ini`."""
import re
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

here = Path(__file__).parent
parser = ConfigParser(delimiters=['='])
parser.read(here/'settings.ini', encoding='utf-8')
cfg = parser['DEFAULT']

def readme():
    "README.md with the address of the repository before links to its files: elsewhere there are none beside it."
    place = f'{cfg["user"]}/{cfg["repo"]}'
    text = (here/'README.md').read_text(encoding='utf-8')
    text = re.sub(r'(!\[[^\]]*\])\((?!https?:|#)([^)\s]+)\)', rf'\1(https://raw.githubusercontent.com/{place}/{cfg["branch"]}/\2)', text)
    return re.sub(r'\]\((?!https?:|#)([^)\s]+)\)', rf'](https://github.com/{place}/blob/{cfg["branch"]}/\1)', text)

setup(
    name=cfg['lib_name'], version=cfg['version'], description=cfg['description'], keywords=cfg['keywords'],
    author=cfg['author'], author_email=cfg['author_email'], license='Apache-2.0', url=cfg['git_url'],
    project_urls=dict(Documentation=cfg['doc_host']+cfg['doc_baseurl'], Paper='https://arxiv.org/abs/2403.09891'),
    long_description=readme(), long_description_content_type='text/markdown',
    packages=find_packages(include=['fisher_nodes', 'fisher_nodes.*']), package_data={'fisher_nodes': ['py.typed', '*.pyi', '*.json']},
    include_package_data=True, zip_safe=False,
    python_requires=f">={cfg['min_python']}", install_requires=cfg['requirements'].split(),
    extras_require={'peft': cfg['peft_requirements'].split(), 'mergekit': cfg['mergekit_requirements'].split(), 'provenance': cfg['provenance_requirements'].split(), 'dev': cfg['dev_requirements'].split() + cfg['docs_requirements'].split(), 'docs': cfg['docs_requirements'].split()},
    entry_points={'console_scripts': cfg['console_scripts'].split(), 'nbdev': ['fisher_nodes=fisher_nodes._modidx:d']},
    classifiers=['Development Status :: 3 - Alpha', 'Intended Audience :: Science/Research',
                 'Programming Language :: Python :: 3', 'Typing :: Typed', 'Topic :: Scientific/Engineering :: Artificial Intelligence'],
)
