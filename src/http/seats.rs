//! Seats: how many connections are served at once, how many of one address, and which idle one makes room.
//!
//! A connection without a seat is one of a small reserve: it may ask for the broker's health, which must always answer. For
//! anything else it waits a moment for a seat, and is told to come again.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use ipnet::IpNet;
use tokio::sync::Notify;
use tokio::time::Instant;

use super::rates::holder;
use super::wire::Pulse;

/// How many connections there are beyond the seats: health checks are few and short.
pub(super) const RESERVE: usize = 64;
/// How long a request waits for a seat, and how many wait: the rest of the reserve is for health checks.
const WAIT: Duration = Duration::from_secs(1);
const WAITING: usize = RESERVE / 4;
/// How soon another idle connection is asked to make room.
const ASK_AGAIN: Duration = Duration::from_millis(100);

/// How long every connection may take before its first request begins to arrive, also where others need its place: a client
/// sends at once, but the system accepts faster than clients send.
const FIRST_WORD: Duration = Duration::from_millis(100);

/// Why there is no seat.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum NoSeat {
    /// All are taken.
    Full,
    /// The address has as many as it may.
    Address(usize),
}

/// The seats of one broker.
pub(super) struct Seats {
    most: usize,
    /// How many one address may hold; 0: no limit.
    per_address: usize,
    /// Proxies hold connections for many.
    trusted: Vec<IpNet>,
    held: Mutex<Held>,
    /// Rings when a seat is free again.
    freed: Notify,
}

#[derive(Default)]
struct Held {
    next: u64,
    seated: HashMap<u64, Seated>,
    addresses: HashMap<IpAddr, usize>,
    /// Those without a seat.
    standing: HashMap<u64, (Arc<Pulse>, Arc<Notify>)>,
    /// How many of them wait for one.
    waiting: usize,
}

struct Seated {
    address: IpAddr,
    pulse: Arc<Pulse>,
    leave: Arc<Notify>,
}

/// A connection's place; dropped, it is free again.
pub(super) struct Place {
    seats: Arc<Seats>,
    id: u64,
    address: IpAddr,
    /// Proxies hold connections for many.
    is_trusted: bool,
    pulse: Arc<Pulse>,
    leave: Arc<Notify>,
    entered: Instant,
    /// Whether it had no seat when it came.
    pub(super) is_late: bool,
}

impl Seats {
    pub(super) fn new(most: usize, per_address: usize, trusted: Vec<IpNet>) -> Self {
        Self { most, per_address, trusted, held: Mutex::default(), freed: Notify::new() }
    }

    fn held(&self) -> MutexGuard<'_, Held> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether whoever was served should come again behind those who wait.
    pub(super) fn is_full(&self) -> bool {
        self.held().seated.len() >= self.most
    }

    /// A place for a connection that was just accepted.
    pub(super) fn enter(self: &Arc<Self>, peer: IpAddr, pulse: Arc<Pulse>) -> Place {
        let (address, leave) = (holder(peer), Arc::new(Notify::new()));
        let is_trusted = self.trusted.iter().any(|net| net.contains(&peer));
        let mut held = self.held();
        held.next += 1;
        let (seats, id, entered) = (Arc::clone(self), held.next, Instant::now());
        let mut place = Place { seats, id, address, is_trusted, pulse, leave, entered, is_late: false };
        match self.take(&mut held, &place) {
            // A little stays free, so that the next need not wait.
            Ok(()) if held.seated.len() + self.most / 16 >= self.most => dismiss(&held, None),
            Ok(()) => {}
            Err(_) => {
                place.is_late = true;
                if held.standing.len() >= RESERVE / 2 {
                    dismiss_standing(&held);
                }
                held.standing.insert(place.id, (Arc::clone(&place.pulse), Arc::clone(&place.leave)));
            }
        }
        drop(held);
        place
    }

    fn take(&self, held: &mut Held, place: &Place) -> Result<(), NoSeat> {
        let of_address = held.addresses.get(&place.address).copied().unwrap_or(0);
        if self.per_address > 0 && of_address >= self.per_address && !place.is_trusted {
            return Err(NoSeat::Address(self.per_address));
        }
        if held.seated.len() >= self.most {
            return Err(NoSeat::Full);
        }
        let (pulse, leave) = (Arc::clone(&place.pulse), Arc::clone(&place.leave));
        held.standing.remove(&place.id);
        held.seated.insert(place.id, Seated { address: place.address, pulse, leave });
        *held.addresses.entry(place.address).or_default() += 1;
        Ok(())
    }
}

/// Asks the connection that has waited longest for its next request to end, of one address or of all.
fn dismiss(held: &Held, of: Option<IpAddr>) {
    let idle = held.seated.values().filter(|seated| of.is_none_or(|address| seated.address == address));
    let idle = idle.filter_map(|seated| Some((seated.pulse.idle_since()?, seated)));
    if let Some((_, oldest)) = idle.min_by_key(|(since, _)| *since) {
        oldest.pulse.dismiss();
        oldest.leave.notify_one();
    }
}

/// Asks the connection without a seat that has said nothing for longest to end: who asks for health says so at once.
fn dismiss_standing(held: &Held) {
    let silent = held.standing.iter().filter(|(_, (pulse, _))| pulse.is_silent());
    if let Some((_, (pulse, leave))) = silent.min_by_key(|(id, _)| **id) {
        pulse.dismiss();
        leave.notify_one();
    }
}

/// A request that waits for a seat; dropped, it waits no longer.
struct Waiting<'a>(&'a Seats);

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.0.held().waiting -= 1;
    }
}

impl Place {
    /// Returns when the connection should end, being idle, for others need its seat. Not before [`FIRST_WORD`] has passed.
    pub(super) async fn dismissed(&self) {
        tokio::time::sleep_until(self.entered + FIRST_WORD).await;
        self.leave.notified().await;
    }

    /// Makes sure that there is a seat, and waits for one that is free soon.
    pub(super) async fn seat(&self) -> Result<(), NoSeat> {
        let deadline = Instant::now() + WAIT;
        let mut waiting = None;
        loop {
            let freed = self.seats.freed.notified();
            tokio::pin!(freed);
            // It must hear of a seat that is freed between the look and the wait.
            freed.as_mut().enable();
            let why = {
                let mut held = self.seats.held();
                if held.seated.contains_key(&self.id) {
                    return Ok(());
                }
                match self.seats.take(&mut held, self) {
                    Ok(()) => return Ok(()),
                    Err(why) if waiting.is_none() && held.waiting >= WAITING => return Err(why),
                    Err(why) => {
                        if waiting.is_none() {
                            held.waiting += 1;
                            waiting = Some(Waiting(&self.seats));
                        }
                        dismiss(&held, matches!(why, NoSeat::Address(_)).then_some(self.address));
                        why
                    }
                }
            };
            // One that was asked to end may have begun a request meanwhile: then another is asked.
            let soon = (Instant::now() + ASK_AGAIN).min(deadline);
            if tokio::time::timeout_at(soon, freed).await.is_err() && Instant::now() >= deadline {
                return Err(why);
            }
        }
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut held = self.seats.held();
        let lower = |counts: &mut HashMap<IpAddr, usize>, address| {
            if let Some(count) = counts.get_mut(&address) {
                *count -= 1;
                if *count == 0 {
                    counts.remove(&address);
                }
            }
        };
        if held.seated.remove(&self.id).is_some() {
            lower(&mut held.addresses, self.address);
        }
        held.standing.remove(&self.id);
        drop(held);
        self.seats.freed.notify_waiters();
    }
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt as _;

    use super::*;

    fn address(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    /// A connection that has been served, and is idle now.
    fn idle(place: &Place) {
        drop(place.pulse.serve());
    }

    #[tokio::test]
    async fn the_connection_that_is_idle_for_longest_makes_room() {
        let seats = Arc::new(Seats::new(3, 0, Vec::new()));
        let enter = |text| seats.enter(address(text), Arc::new(Pulse::new()));
        let [busy, second, first] = [enter("192.0.2.1"), enter("192.0.2.2"), enter("192.0.2.3")];
        let _busy = busy.pulse.serve();
        for place in [&first, &second] {
            idle(place);
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        let late = enter("192.0.2.4");
        assert!(late.is_late && seats.is_full());
        let waiting = tokio::spawn(async move { late.seat().await.map(|()| late) });
        first.dismissed().await;
        drop(first);
        let late = waiting.await.unwrap().expect("a seat is free");
        assert!(second.leave.notified().now_or_never().is_none(), "one was enough");
        drop((busy, second, late));
        let held = seats.held();
        assert_eq!((held.seated.len(), held.addresses.len(), held.standing.len()), (0, 0, 0));
    }

    #[tokio::test]
    async fn an_address_holds_only_so_many_seats_and_proxies_as_many_as_they_need() {
        let seats = Arc::new(Seats::new(100, 2, vec!["10.0.0.0/8".parse().unwrap(), "2001:db8:1::7/128".parse().unwrap()]));
        let enter = |text| seats.enter(address(text), Arc::new(Pulse::new()));
        let own = [enter("192.0.2.1"), enter("192.0.2.1")];
        let over = enter("192.0.2.1");
        assert_eq!((over.is_late, over.seat().await), (true, Err(NoSeat::Address(2))));
        assert!(!enter("192.0.2.2").is_late);
        let proxy: Vec<Place> = (0..20).map(|_| enter("10.1.2.3")).collect();
        assert!(proxy.iter().all(|place| !place.is_late));
        let proxy: Vec<Place> = (0..3).map(|_| enter("2001:db8:1::7")).collect();
        assert!(proxy.iter().all(|place| !place.is_late), "one address of a network that is not trusted as a whole");
        // An IPv6 address is its whole network.
        let nets = ["2001:db8::1", "2001:db8::2", "2001:db8::3"].map(enter);
        assert_eq!(nets.each_ref().map(|place| place.is_late), [false, false, true]);
        drop(own);
        assert_eq!(over.seat().await, Ok(()));
    }

    #[tokio::test]
    async fn nobody_is_asked_to_end_before_a_first_request_can_arrive() {
        let seats = Arc::new(Seats::new(0, 0, Vec::new()));
        let begun = Instant::now();
        let crowd: Vec<Place> = (0..RESERVE).map(|_| seats.enter(address("192.0.2.1"), Arc::new(Pulse::new()))).collect();
        crowd[0].dismissed().await;
        assert!(begun.elapsed() >= FIRST_WORD, "{:?}", begun.elapsed());
    }

    #[tokio::test]
    async fn who_says_nothing_leaves_the_reserve_to_whoever_comes() {
        let seats = Arc::new(Seats::new(1, 0, Vec::new()));
        let enter = || seats.enter(address("192.0.2.1"), Arc::new(Pulse::new()));
        let seated = enter();
        let _busy = seated.pulse.serve();
        let crowd: Vec<Place> = (0..RESERVE).map(|_| enter()).collect();
        let asked = crowd.iter().filter(|place| place.leave.notified().now_or_never().is_some()).count();
        assert_eq!(asked, RESERVE / 2, "the older half was asked to end");
        // Few wait for a seat; the others hear at once that there is none.
        let begun = Instant::now();
        let served: Vec<_> = crowd.iter().map(|place| place.pulse.serve()).collect();
        let outcomes =
            futures_util::future::join_all(crowd.iter().map(async |place| (place.seat().await, begun.elapsed()))).await;
        assert!(outcomes.iter().all(|(outcome, _)| *outcome == Err(NoSeat::Full)));
        assert_eq!(outcomes.iter().filter(|(_, took)| *took >= WAIT).count(), WAITING);
        assert_eq!(seats.held().waiting, 0);
        drop(served);
    }
}
