//! Runs the plan: kills, stops and network faults. Each is undone after its time while the next ones already begin.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use futures_util::future::{join_all, try_join_all};
use time::OffsetDateTime;
use tokio::sync::{Mutex, OwnedMutexGuard};
use tokio::task::JoinSet;

use crate::Failure;
use crate::cluster::Cluster;
use crate::plan::{Event, Fault, Link, Target, kills_of};

/// How many faults of each kind were injected, and when each killed server recovered.
#[derive(Debug, Default)]
pub(crate) struct FaultCounts {
    pub(crate) kills: BTreeMap<String, usize>,
    pub(crate) stops: BTreeMap<String, usize>,
    pub(crate) toxics: BTreeMap<&'static str, usize>,
    pub(crate) killed: usize,
    /// Each target that was killed, with the time when it answered again.
    pub(crate) recovered: Vec<(Target, OffsetDateTime)>,
}

/// One lock per server and link: a fault waits until the previous fault of the same server or link is undone.
#[derive(Default)]
struct FaultLocks(BTreeMap<String, Arc<Mutex<()>>>);

impl FaultLocks {
    async fn lock(&mut self, names: impl IntoIterator<Item = String>) -> Vec<OwnedMutexGuard<()>> {
        let locks: Vec<_> = names.into_iter().map(|name| Arc::clone(self.0.entry(name).or_default())).collect();
        join_all(locks.into_iter().map(Mutex::lock_owned)).await
    }
}

type Recoveries = JoinSet<Result<Option<(Target, OffsetDateTime)>, Failure>>;

/// Runs the whole plan. Returns when every fault is undone.
pub(crate) async fn run(cluster: &Arc<Cluster>, plan: &[Event]) -> Result<FaultCounts, Failure> {
    let (mut counts, mut locks, mut recoveries) = (FaultCounts::default(), FaultLocks::default(), Recoveries::new());
    for (number, event) in plan.iter().enumerate() {
        tokio::time::sleep(event.delay).await;
        match event.fault {
            Fault::Kill(Target::Backend) => {
                let _postgres = locks.lock(["postgres".to_owned()]).await;
                cluster.postgres.kill_one_child(number).await;
                counts.kill(Target::Backend, cluster.replicas.len());
            }
            Fault::Kill(target) => {
                let servers = cluster.servers(target);
                let guards = locks.lock(servers.iter().map(|server| server.name().to_owned())).await;
                try_join_all(servers.iter().map(|server| server.kill())).await?;
                counts.kill(target, cluster.replicas.len());
                let duration = event.duration;
                recoveries.spawn(async move {
                    tokio::time::sleep(duration).await;
                    try_join_all(servers.iter().map(|server| server.start_until_ready())).await?;
                    drop(guards);
                    Ok(Some((target, OffsetDateTime::now_utc())))
                });
            }
            Fault::Stop(target) => {
                let servers = cluster.servers(target);
                let guards = locks.lock(servers.iter().map(|server| server.name().to_owned())).await;
                join_all(servers.iter().map(|server| server.signal("STOP"))).await;
                *counts.stops.entry(target.to_string()).or_default() += 1;
                let duration = event.duration;
                recoveries.spawn(async move {
                    tokio::time::sleep(duration).await;
                    join_all(servers.iter().map(|server| server.signal("CONT"))).await;
                    drop(guards);
                    Ok(None)
                });
            }
            Fault::Network(link, toxic) => {
                let guards = locks.lock([format!("link {link}")]).await;
                cluster.proxies.add_toxic(link, toxic).await?;
                *counts.toxics.entry(toxic.name()).or_default() += 1;
                let (cluster, duration) = (Arc::clone(cluster), event.duration);
                recoveries.spawn(async move {
                    tokio::time::sleep(duration).await;
                    cluster.proxies.remove_toxic(link, toxic).await?;
                    drop(guards);
                    Ok(None)
                });
            }
        }
        counts.collect_recoveries(&mut recoveries, false).await?;
        if (number + 1) % 100 == 0 {
            eprintln!("{} of {} faults, {} kills", number + 1, plan.len(), counts.killed);
        }
    }
    counts.collect_recoveries(&mut recoveries, true).await?;
    Ok(counts)
}

impl FaultCounts {
    fn kill(&mut self, target: Target, replicas: usize) {
        let kills = kills_of(target, replicas);
        *self.kills.entry(target.to_string()).or_default() += kills;
        self.killed += kills;
    }

    /// Collects the recoveries that are done; with `all` it waits for every one.
    async fn collect_recoveries(&mut self, recoveries: &mut Recoveries, all: bool) -> Result<(), Failure> {
        loop {
            let recovered = match all {
                true => tokio::time::timeout(Duration::from_secs(300), recoveries.join_next())
                    .await
                    .map_err(|_| Failure("a server or link did not recover within 300 s".into()))?,
                false => recoveries.try_join_next(),
            };
            match recovered {
                Some(Ok(recovered)) => self.recovered.extend(recovered?),
                Some(Err(error)) => return Err(Failure(format!("a recovery task panicked: {error}"))),
                None => return Ok(()),
            }
        }
    }
}

/// Starts every server and connects to every link, also after a plan that failed.
pub(crate) async fn wait_until_all_run(cluster: &Cluster) -> Result<(), Failure> {
    try_join_all(cluster.servers(Target::Everything).iter().map(|server| server.start_until_ready())).await?;
    for link in Link::all(cluster.replicas.len()) {
        tokio::net::TcpStream::connect(cluster.proxies.address(link)).await?;
    }
    Ok(())
}
