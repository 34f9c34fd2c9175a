//! Whole small uploads beside direct PUTs, and complete beside what a complete cannot do without.

use std::time::Duration;

use crate::clients::{BrokerClient, Payload, SMALL_BYTES, Uploads};
use crate::limits::{BareCompletes, DirectPuts};
use crate::report::{Row, Target, counted};
use crate::{Failure, Run, load};

/// Numbers of clients, and the target for each.
const CLIENTS: [(usize, f64); 4] = [(1, 0.30), (8, 0.45), (32, 0.50), (64, 0.50)];
/// The numbers of clients whose completes are compared.
const COMPLETE_CLIENTS: [usize; 3] = [1, 8, 32];
/// How much longer a complete may take than its parts.
const COMPLETE: Target = Target::RatioAtMost(3.0);
/// The CPU time of the broker for one whole upload, in milliseconds.
const CPU_MS: Target = Target::ValueAtMost(1.0);

/// Clients of one tenant.
fn clients(url: &str, tokens: &[String], payload: &Payload, clients: usize) -> Vec<Uploads> {
    (0..clients).map(|_| Uploads::new(BrokerClient::new(&[url], &tokens[..1]), payload)).collect()
}

/// Whole uploads per second, and the CPU time and the WAL of one.
pub(crate) async fn measure(run: &mut Run) -> Result<(), Failure> {
    let (plan, payload, tokens) = (run.plan, Payload::random(SMALL_BYTES), run.servers.tokens.clone());
    for (number, target) in CLIENTS {
        let (mut uploads, mut cpu_ms, mut wal_kib, mut puts) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
        let url = run.main_broker().await?.url().to_owned();
        let mut uploading = clients(&url, &tokens, &payload, number);
        let mut putting: Vec<_> = (0..number).map(|_| DirectPuts::new(&run.servers, &payload)).collect();
        for _ in 0..plan.rounds {
            let found;
            (found, putting) = load::run(putting, plan.sample).await?;
            puts.push(found.per_second());
            let (wal, cpu) = (run.servers.wal_bytes().await?, run.main_broker().await?.cpu()?);
            let found;
            (found, uploading) = load::run(uploading, plan.sample).await?;
            uploads.push(found.per_second());
            let cpu = run.main_broker().await?.cpu()?.saturating_sub(cpu);
            cpu_ms.push(milliseconds(cpu) / found.count() as f64);
            wal_kib.push((run.servers.wal_bytes().await? - wal) / 1024.0 / found.count() as f64);
        }
        let clients = counted(number, "client");
        let row = Row::ratio(format!("open + PUT 1 KiB + complete, {clients}, 1/s"), "direct PUT, 1/s", uploads, puts);
        run.rows.push(row.target(Target::RatioAtLeast(target)));
        run.rows.push(Row::value(format!("broker CPU for one upload, {clients}, ms"), cpu_ms).target(CPU_MS));
        run.rows.push(Row::value(format!("WAL of PostgreSQL for one upload, {clients}, KiB"), wal_kib));
    }
    Ok(())
}

/// The latency of complete.
pub(crate) async fn measure_complete(run: &mut Run) -> Result<(), Failure> {
    let (plan, payload, tokens) = (run.plan, Payload::random(SMALL_BYTES), run.servers.tokens.clone());
    let url = run.main_broker().await?.url().to_owned();
    for number in COMPLETE_CLIENTS {
        let (mut completes, mut bare_completes) = ([Vec::new(), Vec::new()], [Vec::new(), Vec::new()]);
        let mut uploading = clients(&url, &tokens, &payload, number);
        let mut bare = BareCompletes::clients(&run.servers, &payload, number).await?;
        for _ in 0..plan.rounds {
            let found;
            (found, bare) = load::run(bare, plan.sample).await?;
            for (values, percent) in bare_completes.iter_mut().zip([50, 99]) {
                values.push(found.latencies().percentile_ms(percent));
            }
            (_, uploading) = load::run(uploading, plan.sample).await?;
            let (latencies, _) = Uploads::take_latencies(&mut uploading);
            for (values, percent) in completes.iter_mut().zip([50, 99]) {
                values.push(latencies.percentile_ms(percent));
            }
        }
        for ((values, limit_values), percent) in completes.into_iter().zip(bare_completes).zip([50, 99]) {
            let limit = format!("HEAD + 2 commits + 1 transaction, p{percent}, ms");
            let row = Row::ratio(format!("complete, {}, p{percent}, ms", counted(number, "client")), limit, values, limit_values);
            run.rows.push(row.target(COMPLETE));
        }
    }
    Ok(())
}

fn milliseconds(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1000.0
}
