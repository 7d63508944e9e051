"""Data sets of the experiments: checked files in, NamedTuples of numpy arrays out."""

from experiments.data.cifar import cifar10
from experiments.data.files import DataFileError, locate
from experiments.data.hyperclean import cleaning, shifted
from experiments.data.ijcnn import ijcnn1
from experiments.data.images import fashion_mnist, mnist
from experiments.data.newsgroups import twenty_newsgroups
from experiments.data.records import Cleaning, Images, Table, ThreeWay
from experiments.data.tables import breast_cancer, covtype, digits

__all__ = [
    "Cleaning",
    "DataFileError",
    "Images",
    "Table",
    "ThreeWay",
    "breast_cancer",
    "cifar10",
    "cleaning",
    "covtype",
    "digits",
    "fashion_mnist",
    "ijcnn1",
    "locate",
    "mnist",
    "shifted",
    "twenty_newsgroups",
]
