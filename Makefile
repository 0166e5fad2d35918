# make demo: train a hybrid and its two baselines on the bundled sample, and look at the result
# make test: run the tests
# make test-all: run the long ones too

PYTHON ?= python3
VENV ?= .venv
INSTALLED := $(VENV)/.installed

.PHONY: demo test test-all clean

demo: $(INSTALLED)
	$(VENV)/bin/python demo.py

test: $(INSTALLED)
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -n 2 --dist loadfile

test-all: $(INSTALLED)
	$(VENV)/bin/python -m pytest -m "long or not long"

$(INSTALLED): setup.cfg constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --constraint constraints.txt --editable '.[corpus,offline,onnx,serve,tensorboard,test]'
	touch $@

clean:
	rm -rf $(VENV) runs *.egg-info
