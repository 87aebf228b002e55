# Verbs; each is one script. A bare `make` lists them.

.PHONY: help setup build demo test integration conformance bench soak lint package packages clean

help: ## list the verbs
	@sed -n 's/^\([a-z]*\): ## /  make \1\t/p' $(MAKEFILE_LIST) | expand -t 20

setup: ## install what is missing on this Debian machine and build the tools (root)
	@scripts/setup

build: ## static binaries into bin/
	@scripts/build

demo: ## a coordinator, three hosts and containers that talk, on this machine (root); KEEP=1 leaves it up, CLEAN=1 removes it; STORE=etcd for two coordinators
	@KEEP="$(KEEP)" CLEAN="$(CLEAN)" STORE="$(STORE)" scripts/demo

test: ## everything CI checks: setup, build, lint, all tests (root)
	@scripts/test

integration: ## containers through the real engines; writes docs/runtimes/README.md (root)
	@scripts/integration

conformance: ## what the CNI programs promise, line by line; writes docs/conformance.md (root)
	@scripts/conformance

bench: ## measure against the peers, in one run (root); PARTS="attach burst" picks some
	@scripts/bench $(PARTS)

soak: ## the runs that are too long for CI (root)
	@scripts/soak

lint: ## gofmt, go vet, staticcheck, the layer rules
	@scripts/lint

package: ## .deb and .rpm packages and archives for amd64 and arm64, in dist/
	@scripts/package

packages: ## install, upgrade, downgrade, remove and purge the packages on a Debian made for it (root)
	@scripts/packages

clean: ## remove what the other verbs built
	@scripts/clean
