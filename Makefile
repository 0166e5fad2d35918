# make demo: train a hybrid and its two baselines on the bundled sample, and look at the result
# make test: run the tests

PYTHON ?= python3
VENV ?= .venv
INSTALLED := $(VENV)/.installed

.PHONY: demo test clean

demo: $(INSTALLED)
	$(VENV)/bin/python demo.py

test: $(INSTALLED)
	$(VENV)/bin/python -m pytest

$(INSTALLED): setup.cfg constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --constraint constraints.txt --editable '.[offline,onnx,tensorboard,test]'
	touch $@

clean:
	rm -rf $(VENV) runs *.egg-info
