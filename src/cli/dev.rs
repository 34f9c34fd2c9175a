//! `dev`: start everything, say where it is and what to try, and end everything.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::pin::pin;

use super::{Error, asked_to_end, log, talk};
use crate::dev::{self, Dev};
use crate::{config, http};

#[derive(clap::Args)]
pub(super) struct Arguments {
    /// Where the API listens
    #[arg(long, default_value = "127.0.0.1:8080")]
    listen: SocketAddr,
    /// Where the data is kept
    #[arg(long, default_value = ".lfs-broker")]
    data_dir: PathBuf,
    /// Remove the data at the end
    #[arg(long)]
    ephemeral: bool,
    /// Use a real Kafka instead of the embedded one
    #[arg(long, value_name = "HOST:PORT")]
    kafka: Option<String>,
    /// Origins whose pages may call the API, separated by commas
    #[arg(long, env = "LFS_BROKER_CORS_ORIGINS", value_name = "ORIGIN", value_delimiter = ',')]
    cors_origins: Vec<String>,
}

pub(super) async fn dev(arguments: Arguments) -> Result<(), Error> {
    log("lfs_broker=info,warn");
    http::raise_descriptors();
    let Arguments { listen, data_dir, ephemeral, kafka, cors_origins } = arguments;
    let mut ending = pin!(asked_to_end());
    let cors_origins = cors_origins.iter().map(|origin| config::origin(origin)).collect::<Result<Vec<_>, _>>()?;
    let settings = dev::Settings { listen, data_dir, ephemeral, kafka, cors_origins };
    let Some(started) = dev::start(settings, ending.as_mut()).await? else { return Ok(()) };
    tell(&started);
    ending.await;
    talk::note("ending");
    started.stop().await?;
    Ok(())
}

fn tell(dev: &Dev) {
    let places = dev.places();
    let kafka =
        if dev.has_embedded_kafka() { "embedded, in memory, at least once; --kafka HOST:PORT takes a real one" } else { "yours" };
    let store = format!("{}/{}", places.s3_endpoint, places.bucket);
    talk::note(&format!(
        "\n\
        lfs-broker is ready. Ctrl-C ends everything.\n\n\
        \x20 API       {broker}  (contract: {broker}/docs)\n\
        \x20 S3        {store}\n\
        \x20 Kafka     {bootstrap}  ({kafka})\n\
        \x20 Postgres  {database}\n\
        \x20 all of it {file}\n\n\
        Try it:\n\n\
        \x20 echo hello > hello.txt\n\
        \x20 # open an upload\n\
        \x20 curl -s {broker}/lfs/uploads -H 'content-type: application/json' \\\n\
        \x20   -d \"{{\\\"topic\\\":\\\"demo\\\",\\\"key\\\":\\\"k1\\\",\\\"size\\\":6,\\\"sha256\\\":\\\"$(sha256sum hello.txt | cut -d' ' -f1)\\\"}}\" > open.json\n\
        \x20 # put the bytes straight into S3\n\
        \x20 jq -r '.upload.headers | to_entries[] | \"header = \\\"\\(.key): \\(.value)\\\"\"' open.json > put.conf\n\
        \x20 curl -f -T hello.txt -K put.conf \"$(jq -r .upload.url open.json)\"\n\
        \x20 # complete: verified, recorded, in Kafka\n\
        \x20 curl -s -X POST {broker}/lfs/uploads/$(jq -r .id open.json)/complete > done.json; jq . done.json\n\
        \x20 # resolve the pointer back into the bytes\n\
        \x20 jq -c .pointer done.json | curl -s {broker}/lfs/resolve -H 'content-type: application/json' -d @- | jq -r .url | xargs curl -s\n",
        broker = places.broker_url,
        bootstrap = places.kafka_bootstrap,
        database = places.database_url,
        file = dev.data_dir().join("dev.json").display(),
    ));
}
