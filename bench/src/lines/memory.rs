//! Memory: what a broker needs with 10,000 open sessions, and while it completes 64 multipart uploads.

use futures_util::future::try_join_all;
use lfs_broker_client::Client;

use super::large;
use crate::broker::Broker;
use crate::clients::{BrokerClient, Opens, Payload, SMALL_BYTES};
use crate::report::{Row, Target};
use crate::{Failure, Run, load};

const DATABASE: &str = "memory";
const OPEN_SESSIONS: usize = 10_000;
const OPENING_CLIENTS: usize = 16;
const MULTIPART_UPLOADS: usize = 64;
/// Two parts each.
const MULTIPART_BYTES: usize = 10 << 20;
const PART_BYTES: u64 = 5 << 20;

/// Memory in MiB, on a fresh broker: the memory of earlier lines stays with the shared one.
pub(crate) async fn measure(run: &mut Run) -> Result<(), Failure> {
    run.stop_main_broker().await?;
    run.servers.create_database(DATABASE).await?;
    let broker = Broker::start(&run.servers, DATABASE, DATABASE, &[]).await?;
    super::warm_up(&run.servers, &broker).await?;
    let (tokens, payload) = (run.servers.tokens.clone(), Payload::random(SMALL_BYTES));

    let opening = (0..OPENING_CLIENTS).map(|_| {
        let client = BrokerClient::new(&[broker.url()], &tokens[..1]);
        let mut opens = Opens { client, payload: payload.clone(), with_key: false };
        async move { load::repeat(&mut opens, OPEN_SESSIONS / OPENING_CLIENTS).await }
    });
    try_join_all(opening).await?;
    let row = Row::value(format!("broker memory with {OPEN_SESSIONS} open sessions, MiB"), vec![broker.memory_mib()?]);
    run.rows.push(row.target(Target::ValueAtMost(48.0)));

    broker.forget_peak()?;
    let bytes = Payload::random(MULTIPART_BYTES).bytes;
    let client = Client::new(broker.url())?.with_token(&*tokens[0]);
    try_join_all((0..MULTIPART_UPLOADS).map(|_| large::upload(&client, &bytes, Some(PART_BYTES)))).await?;
    let peak = vec![broker.peak_memory_mib()?];
    let row = Row::value(format!("broker memory under {MULTIPART_UPLOADS} multipart uploads, peak, MiB"), peak);
    run.rows.push(row.target(Target::ValueAtMost(64.0)));
    broker.stop().await
}
