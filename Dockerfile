# The image of pgkeep: one program and the certificates it trusts.
#
#   docker build -t pgkeep .
#
# The same program runs as sidecar, as init container and, copied into the PostgreSQL container, as restore_command.
# For the last of these the base must not have a newer glibc than the PostgreSQL image: bookworm's runs on bookworm
# and on anything later.
ARG RUST=rust:1-bookworm
ARG BASE=debian:bookworm-slim

FROM ${RUST} AS build
WORKDIR /pgkeep
COPY . .
RUN cargo build --locked --profile dist --bin pgkeep

FROM ${BASE}
RUN apt-get update \
    && apt-get install --yes --no-install-recommends ca-certificates \
    && rm -rf /var/lib/apt/lists/*
COPY --from=build /pgkeep/target/dist/pgkeep /usr/local/bin/pgkeep
# Under PGHoard's names it is PGHoard's programs.
RUN ["/usr/local/bin/pgkeep", "links", "/usr/local/bin"]
COPY --from=build /pgkeep/LICENSE /usr/share/doc/pgkeep/LICENSE
# The user of the official PostgreSQL images, so that a sidecar and an init container can share its files.
USER 999:999
EXPOSE 16000
ENTRYPOINT ["/usr/local/bin/pgkeep"]
CMD ["run"]
