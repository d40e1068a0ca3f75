"""CIFAR-100, all of it, adversarially trained."""

from configs import common


def get_config(arg=None):
    return common.small_images("cifar100", arg)
