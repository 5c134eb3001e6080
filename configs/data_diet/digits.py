"""Data Diet on scikit-learn's digits: about a minute on two CPU cores.

python -m experiments data_diet configs/data_diet/digits.py
"""

from experiments.data_diet import Config

config = Config()
