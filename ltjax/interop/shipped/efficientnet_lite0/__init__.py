"""ImageNet weights of EfficientNet-Lite0's backbone, under the licence in `NOTICE`; `make.py` made them."""
