# syntax=docker/dockerfile:1
FROM rust:1.95-bookworm AS build
WORKDIR /src
COPY . .
# The cache mounts are kept between builds on one machine, but are not part of the layer. So copy the program out of the cache.
# Without default features the program has no `dev` command and no embedded servers.
RUN --mount=type=cache,target=/usr/local/cargo/registry \
    --mount=type=cache,target=/src/target \
    cargo build --release --locked --package lfs-broker --no-default-features \
    && cp target/release/lfs-broker /usr/local/bin/

FROM debian:bookworm-slim
# ca-certificates is for TLS to Kafka and S3, curl for health checks.
RUN apt-get update \
    && apt-get install -y --no-install-recommends ca-certificates curl \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --system --uid 65532 --no-create-home --shell /usr/sbin/nologin lfs-broker
COPY --from=build /usr/local/bin/lfs-broker /usr/local/bin/
USER 65532:65532
EXPOSE 8080
ENTRYPOINT ["lfs-broker"]
CMD ["serve"]
