# make test    everything, from a clean clone: what the tests need, lints, docs, build, tests, demo
# make demo    back up, destroy and restore a throwaway PostgreSQL, told as a story
# make build   the program: target/release/pgkeep
# make lint    formatting, clippy, docs, licences
# make bench   the benchmarks
# make clean   removes target/

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.NOTPARALLEL:
.PHONY: test test-deps lint deny build check demo bench clean

# A test that cannot run here must fail, not be skipped.
test: export PGKEEP_TEST_REQUIRED = 1
test: test-deps lint build check demo

test-deps:
	scripts/install-test-deps

lint: deny
	cargo fmt --check
	cargo clippy --locked --all-targets -- -D warnings
	RUSTDOCFLAGS="-D warnings" cargo doc --locked --no-deps

# Licences, bans, sources, advisories (deny.toml). cargo-deny takes minutes to build, so it is used where it is.
deny:
	scripts/deny

build:
	cargo build --locked --release

check:
	scripts/with-s3 cargo test --locked

demo: build
	scripts/demo

bench:
	cargo bench --locked

clean:
	cargo clean
