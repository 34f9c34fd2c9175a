//! `dev`: starts all components, prints their addresses and example commands, and stops all components at the end.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::pin::pin;

use tokio::sync::oneshot;

use super::dev_settings::DEFAULT_DATA_DIR;
use super::output::print_note;
use super::{Error, environment, init_logging, shutdown_signal};
use crate::dev::{self, Dev};
use crate::{config, http};

#[derive(clap::Args)]
pub(super) struct Arguments {
    /// The address on which the API listens
    #[arg(long, default_value = "127.0.0.1:8080", value_parser = listen_address)]
    listen: SocketAddr,
    /// The directory for the data
    #[arg(long, default_value = DEFAULT_DATA_DIR)]
    data_dir: PathBuf,
    /// Remove the data when the command stops
    #[arg(long)]
    ephemeral: bool,
    /// Use a real Kafka instead of the embedded one
    #[arg(long, value_name = "HOST:PORT")]
    kafka: Option<String>,
    /// Web origins whose pages may call the API, separated by commas
    #[arg(long, env = "LFS_BROKER_CORS_ORIGINS", value_name = "ORIGIN", value_delimiter = ',')]
    cors_origins: Vec<String>,
}

/// As `LFS_BROKER_LISTEN` of `serve`.
fn listen_address(text: &str) -> Result<SocketAddr, String> {
    text.parse().map_err(|_| "must be an IP address and a port, such as 127.0.0.1:8080".to_owned())
}

/// The variables that a user of `dev` may set for `dev` itself or for other commands, such as `put`.
const EXPECTED_VARIABLES: [&str; 4] = ["LFS_BROKER_CORS_ORIGINS", "LFS_BROKER_LOG_FORMAT", "LFS_BROKER_TOKEN", "LFS_BROKER_URL"];

/// The settings in the environment that have no effect on `dev`.
fn ignored_variables(environment: &config::Environment) -> Vec<&str> {
    let is_ignored =
        |name: &str, value: &str| name.starts_with("LFS_BROKER_") && !value.is_empty() && !EXPECTED_VARIABLES.contains(&name);
    environment.iter().filter(|(name, value)| is_ignored(name, value)).map(|(name, _)| name.as_str()).collect()
}

pub(super) async fn dev(arguments: Arguments) -> Result<(), Error> {
    init_logging("lfs_broker=info,warn");
    http::raise_file_limit();
    let environment = environment();
    let ignored = ignored_variables(&environment);
    if !ignored.is_empty() {
        print_note(&format!("warning: dev does not read {}; `lfs-broker dev --help` shows its settings", ignored.join(", ")));
    }
    let Arguments { listen, data_dir, ephemeral, kafka, cors_origins } = arguments;
    let (shutdown_sender, shutdown_receiver) = oneshot::channel();
    // A separate task, so that the line appears at once, also while the start blocks this thread.
    let signal = shutdown_signal();
    tokio::spawn(async move {
        signal.await;
        print_note("stopping all components");
        let _ = shutdown_sender.send(());
    });
    let mut shutdown = pin!(async { drop(shutdown_receiver.await) });
    let cors_origins = cors_origins.iter().map(|origin| config::parse_origin(origin)).collect::<Result<Vec<_>, _>>()?;
    let settings = dev::Settings { listen, data_dir, ephemeral, kafka, cors_origins };
    let Some(started) = dev::start(settings, shutdown.as_mut()).await? else { return Ok(()) };
    print_addresses(&started);
    shutdown.await;
    started.stop().await?;
    Ok(())
}

fn print_addresses(dev: &Dev) {
    let endpoints = dev.endpoints();
    let kafka = match dev.has_embedded_kafka() {
        true => "embedded, in memory, at-least-once delivery; use a real Kafka with --kafka HOST:PORT",
        false => "external",
    };
    let store = format!("{}/{}", endpoints.s3_endpoint, endpoints.bucket);
    print_note(&format!(
        "\n\
        lfs-broker is ready. Ctrl-C stops all components.\n\n\
        \x20 API       {broker}  (documentation: {broker}/docs)\n\
        \x20 S3        {store}\n\
        \x20 Kafka     {bootstrap}  ({kafka})\n\
        \x20 Postgres  {database}\n\
        \x20 all addresses are in {file}\n\n\
        Try it:\n\n\
        \x20 echo hello > hello.txt\n\
        \x20 # open an upload\n\
        \x20 curl -s {broker}/lfs/uploads -H 'content-type: application/json' \\\n\
        \x20   -d \"{{\\\"topic\\\":\\\"demo\\\",\\\"key\\\":\\\"k1\\\",\\\"size\\\":6,\\\"sha256\\\":\\\"$(sha256sum hello.txt | cut -d' ' -f1)\\\"}}\" > open.json\n\
        \x20 # put the bytes directly into S3\n\
        \x20 jq -r '.upload.headers | to_entries[] | \"header = \\\"\\(.key): \\(.value)\\\"\"' open.json > put.conf\n\
        \x20 curl -f -T hello.txt -K put.conf \"$(jq -r .upload.url open.json)\"\n\
        \x20 # complete the upload: the broker verifies the object and publishes its pointer to Kafka\n\
        \x20 curl -s -X POST {broker}/lfs/uploads/$(jq -r .id open.json)/complete > done.json; jq . done.json\n\
        \x20 # resolve the pointer and download the bytes\n\
        \x20 jq -c .pointer done.json | curl -s {broker}/lfs/resolve -H 'content-type: application/json' -d @- | jq -r .url | xargs curl -s\n",
        broker = endpoints.broker_url,
        bootstrap = endpoints.kafka_bootstrap,
        database = endpoints.database_url,
        file = dev.data_dir().join("dev.json").display(),
    ));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn settings_that_dev_does_not_read_are_named() {
        let names = ["LFS_BROKER_LISTEN", "LFS_BROKER_S3_BUCKET", "LFS_BROKER_URL", "LFS_BROKER_CORS_ORIGINS", "HOME"];
        let mut environment: config::Environment = names.map(|name| (name.to_owned(), "x".to_owned())).into();
        environment.insert("LFS_BROKER_PART_SIZE_BYTES".to_owned(), String::new());
        assert_eq!(ignored_variables(&environment), ["LFS_BROKER_LISTEN", "LFS_BROKER_S3_BUCKET"]);
    }
}
