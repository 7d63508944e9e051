"""Data sets of the experiments: checked files in, NamedTuples of numpy arrays out."""

from experiments.data.cifar import cifar10
from experiments.data.few_shot import Characters, digits_by_class, fc100, mini_imagenet, sinusoids
from experiments.data.files import DataFileError, locate
from experiments.data.hyperclean import cleaning, shifted
from experiments.data.ijcnn import ijcnn1
from experiments.data.images import fashion_mnist, mnist
from experiments.data.newsgroups import twenty_newsgroups
from experiments.data.omniglot import omniglot
from experiments.data.records import Cleaning, Images, Table, ThreeWay
from experiments.data.tables import breast_cancer, covtype, digits

__all__ = [
    "Characters",
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
    "digits_by_class",
    "fashion_mnist",
    "fc100",
    "ijcnn1",
    "locate",
    "mini_imagenet",
    "mnist",
    "omniglot",
    "shifted",
    "sinusoids",
    "twenty_newsgroups",
]
