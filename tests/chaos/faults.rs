//! Plays the plan: kills, stops and poisons, each healed after its time while the next ones go on.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use futures_util::future::{join_all, try_join_all};
use time::OffsetDateTime;
use tokio::sync::{Mutex, OwnedMutexGuard};
use tokio::task::JoinSet;

use crate::Failure;
use crate::plan::{Event, Fault, Link, Target, kills_of};
use crate::stage::Stage;

/// What was done, and when parts were back.
#[derive(Debug, Default)]
pub(crate) struct Tally {
    pub(crate) kills: BTreeMap<String, usize>,
    pub(crate) stops: BTreeMap<String, usize>,
    pub(crate) toxics: BTreeMap<&'static str, usize>,
    pub(crate) killed: usize,
    /// Each part that was killed, and when it answered again.
    pub(crate) back: Vec<(Target, OffsetDateTime)>,
}

/// What is broken now: a part or link that has not healed is left alone until it has.
#[derive(Default)]
struct Busy(BTreeMap<String, Arc<Mutex<()>>>);

impl Busy {
    async fn take(&mut self, names: impl IntoIterator<Item = String>) -> Vec<OwnedMutexGuard<()>> {
        let locks: Vec<_> = names.into_iter().map(|name| Arc::clone(self.0.entry(name).or_default())).collect();
        join_all(locks.into_iter().map(Mutex::lock_owned)).await
    }
}

type Healing = JoinSet<Result<Option<(Target, OffsetDateTime)>, Failure>>;

/// Plays all of it; returns when everything works again.
pub(crate) async fn play(stage: &Arc<Stage>, plan: &[Event]) -> Result<Tally, Failure> {
    let (mut tally, mut busy, mut healing) = (Tally::default(), Busy::default(), Healing::new());
    for (number, event) in plan.iter().enumerate() {
        tokio::time::sleep(event.gap).await;
        match event.fault {
            Fault::Kill(Target::Backend) => {
                let _postgres = busy.take(["postgres".to_owned()]).await;
                stage.postgres.kill_one_child(number).await;
                tally.kill(Target::Backend, stage.replicas.len());
            }
            Fault::Kill(target) => {
                let parts = stage.parts(target);
                let guards = busy.take(parts.iter().map(|part| part.name().to_owned())).await;
                try_join_all(parts.iter().map(|part| part.kill())).await?;
                tally.kill(target, stage.replicas.len());
                let lasts = event.lasts;
                healing.spawn(async move {
                    tokio::time::sleep(lasts).await;
                    try_join_all(parts.iter().map(|part| part.up())).await?;
                    drop(guards);
                    Ok(Some((target, OffsetDateTime::now_utc())))
                });
            }
            Fault::Stop(target) => {
                let parts = stage.parts(target);
                let guards = busy.take(parts.iter().map(|part| part.name().to_owned())).await;
                join_all(parts.iter().map(|part| part.signal("STOP"))).await;
                *tally.stops.entry(target.to_string()).or_default() += 1;
                let lasts = event.lasts;
                healing.spawn(async move {
                    tokio::time::sleep(lasts).await;
                    join_all(parts.iter().map(|part| part.signal("CONT"))).await;
                    drop(guards);
                    Ok(None)
                });
            }
            Fault::Poison(link, toxic) => {
                let guards = busy.take([format!("link {link}")]).await;
                stage.proxies.poison(link, toxic).await?;
                *tally.toxics.entry(toxic.name()).or_default() += 1;
                let (stage, lasts) = (Arc::clone(stage), event.lasts);
                healing.spawn(async move {
                    tokio::time::sleep(lasts).await;
                    stage.proxies.heal(link, toxic).await?;
                    drop(guards);
                    Ok(None)
                });
            }
        }
        tally.heal(&mut healing, false).await?;
        if (number + 1) % 100 == 0 {
            eprintln!("{} of {} faults, {} kills", number + 1, plan.len(), tally.killed);
        }
    }
    tally.heal(&mut healing, true).await?;
    Ok(tally)
}

impl Tally {
    fn kill(&mut self, target: Target, replicas: usize) {
        let kills = kills_of(target, replicas);
        *self.kills.entry(target.to_string()).or_default() += kills;
        self.killed += kills;
    }

    /// Takes note of what has healed; with `all` waits for the rest.
    async fn heal(&mut self, healing: &mut Healing, all: bool) -> Result<(), Failure> {
        loop {
            let healed = match all {
                true => tokio::time::timeout(Duration::from_secs(300), healing.join_next())
                    .await
                    .map_err(|_| Failure("something did not heal within 300 s".into()))?,
                false => healing.try_join_next(),
            };
            match healed {
                Some(Ok(healed)) => self.back.extend(healed?),
                Some(Err(error)) => return Err(Failure(format!("a healing ended badly: {error}"))),
                None => return Ok(()),
            }
        }
    }
}

/// All links work, all parts answer: whatever a run that broke off left spoiled.
pub(crate) async fn all_up(stage: &Stage) -> Result<(), Failure> {
    try_join_all(stage.parts(Target::Everything).iter().map(|part| part.up())).await?;
    for link in Link::all(stage.replicas.len()) {
        tokio::net::TcpStream::connect(stage.proxies.address(link)).await?;
    }
    Ok(())
}
