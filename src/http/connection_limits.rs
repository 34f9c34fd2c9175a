//! Connection limits: how many connections are served, in total and per address, and which idle connection is closed for a
//! new one.
//!
//! Connections beyond the limits go to a small reserve. In the reserve they may only request the broker's health, so that a
//! health check gets a response under any load.
//! Any other request waits briefly for admission. If the admission fails, the response is 503 or 429.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use ipnet::IpNet;
use tokio::sync::Notify;
use tokio::time::Instant;

use super::monitored_io::ConnectionActivity;
use super::rate_limits::network_of;

/// How many connections are accepted beyond the limit: health checks are few and short.
pub(super) const RESERVE_CONNECTIONS: usize = 64;
/// How long a request waits until its connection is admitted.
const ADMISSION_TIMEOUT: Duration = Duration::from_secs(1);
/// How many requests may wait. The rest of the reserve is for health checks.
const MAX_WAITING: usize = RESERVE_CONNECTIONS / 4;
/// How often a waiting request asks another idle connection to close.
const CLOSE_RETRY_INTERVAL: Duration = Duration::from_millis(100);

/// The time that every connection gets for its first request, even when others need its permit. Clients send at once, but the
/// broker accepts connections faster than clients send.
const FIRST_REQUEST_GRACE: Duration = Duration::from_millis(100);

/// Which limit a connection exceeds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum LimitReached {
    /// The limit of all connections.
    Total,
    /// The limit of connections of one address, with its value.
    PerAddress(usize),
}

/// The connection limits of one broker.
pub(super) struct ConnectionLimits {
    max_connections: usize,
    /// How many connections one address may have; 0: no limit.
    max_per_address: usize,
    /// Networks without a limit per address: proxies, which connect on behalf of many clients.
    trusted: Vec<IpNet>,
    state: Mutex<State>,
    /// Notifies waiting requests when a connection ends.
    freed: Notify,
}

#[derive(Default)]
struct State {
    last_id: u64,
    admitted: HashMap<u64, Admitted>,
    addresses: HashMap<IpAddr, usize>,
    /// Connections that are not admitted.
    reserve: HashMap<u64, (Arc<ConnectionActivity>, Arc<Notify>)>,
    /// How many requests in the reserve wait until they are admitted.
    waiting: usize,
}

struct Admitted {
    address: IpAddr,
    activity: Arc<ConnectionActivity>,
    close_signal: Arc<Notify>,
}

/// The registration of one connection. Dropping it makes room for another.
pub(super) struct ConnectionPermit {
    limits: Arc<ConnectionLimits>,
    id: u64,
    address: IpAddr,
    /// Whether the peer is a trusted proxy.
    is_trusted: bool,
    activity: Arc<ConnectionActivity>,
    close_signal: Arc<Notify>,
    registered_at: Instant,
    /// Whether the connection was registered in the reserve.
    pub(super) in_reserve: bool,
}

impl ConnectionLimits {
    pub(super) fn new(max_connections: usize, max_per_address: usize, trusted: Vec<IpNet>) -> Self {
        Self { max_connections, max_per_address, trusted, state: Mutex::default(), freed: Notify::new() }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether all permits are in use, so that keep-alive connections should be closed.
    pub(super) fn is_saturated(&self) -> bool {
        self.state().admitted.len() >= self.max_connections
    }

    /// Registers a connection that was just accepted.
    pub(super) fn register(self: &Arc<Self>, peer: IpAddr, activity: Arc<ConnectionActivity>) -> ConnectionPermit {
        let (address, close_signal) = (network_of(peer), Arc::new(Notify::new()));
        let is_trusted = self.trusted.iter().any(|net| net.contains(&peer));
        let mut state = self.state();
        state.last_id += 1;
        let (limits, id, registered_at) = (Arc::clone(self), state.last_id, Instant::now());
        let mut permit =
            ConnectionPermit { limits, id, address, is_trusted, activity, close_signal, registered_at, in_reserve: false };
        match self.try_admit(&mut state, &permit) {
            // Some permits stay free, so that the next connection need not wait.
            Ok(()) if state.admitted.len() + self.max_connections / 16 >= self.max_connections => close_oldest_idle(&state, None),
            Ok(()) => {}
            Err(_) => {
                permit.in_reserve = true;
                if state.reserve.len() >= RESERVE_CONNECTIONS / 2 {
                    close_oldest_in_reserve(&state);
                }
                state.reserve.insert(permit.id, (Arc::clone(&permit.activity), Arc::clone(&permit.close_signal)));
            }
        }
        drop(state);
        permit
    }

    fn try_admit(&self, state: &mut State, permit: &ConnectionPermit) -> Result<(), LimitReached> {
        let of_address = state.addresses.get(&permit.address).copied().unwrap_or(0);
        if self.max_per_address > 0 && of_address >= self.max_per_address && !permit.is_trusted {
            return Err(LimitReached::PerAddress(self.max_per_address));
        }
        if state.admitted.len() >= self.max_connections {
            return Err(LimitReached::Total);
        }
        let (activity, close_signal) = (Arc::clone(&permit.activity), Arc::clone(&permit.close_signal));
        state.reserve.remove(&permit.id);
        state.admitted.insert(permit.id, Admitted { address: permit.address, activity, close_signal });
        *state.addresses.entry(permit.address).or_default() += 1;
        Ok(())
    }
}

/// Asks the connection that is idle for the longest time to close. With `of`, only connections of this address count.
fn close_oldest_idle(state: &State, of: Option<IpAddr>) {
    let idle = state.admitted.values().filter(|admitted| of.is_none_or(|address| admitted.address == address));
    let idle = idle.filter_map(|admitted| Some((admitted.activity.idle_since()?, admitted)));
    if let Some((_, oldest)) = idle.min_by_key(|(since, _)| *since) {
        oldest.activity.request_close();
        oldest.close_signal.notify_one();
    }
}

/// Asks the oldest connection in the reserve without a request to close: a health check sends its request at once.
fn close_oldest_in_reserve(state: &State) {
    let without_request = state.reserve.iter().filter(|(_, (activity, _))| activity.may_close_in_reserve());
    if let Some((_, (activity, close_signal))) = without_request.min_by_key(|(id, _)| **id) {
        activity.request_close();
        close_signal.notify_one();
    }
}

/// A request that waits until its connection is admitted. Dropping it ends the wait.
struct Waiting<'a>(&'a ConnectionLimits);

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.0.state().waiting -= 1;
    }
}

impl ConnectionPermit {
    /// Returns when the connection was asked to close because others need its permit. That is not before
    /// [`FIRST_REQUEST_GRACE`] has passed.
    pub(super) async fn close_requested(&self) {
        tokio::time::sleep_until(self.registered_at + FIRST_REQUEST_GRACE).await;
        self.close_signal.notified().await;
    }

    /// Admits the connection, waiting at most [`ADMISSION_TIMEOUT`] for a free permit.
    pub(super) async fn wait_until_admitted(&self) -> Result<(), LimitReached> {
        let deadline = Instant::now() + ADMISSION_TIMEOUT;
        let mut waiting = None;
        loop {
            let freed = self.limits.freed.notified();
            tokio::pin!(freed);
            // Subscribe before the check: a permit may become free between the check and the wait.
            freed.as_mut().enable();
            let reason = {
                let mut state = self.limits.state();
                if state.admitted.contains_key(&self.id) {
                    return Ok(());
                }
                match self.limits.try_admit(&mut state, self) {
                    Ok(()) => return Ok(()),
                    Err(reason) if waiting.is_none() && state.waiting >= MAX_WAITING => return Err(reason),
                    Err(reason) => {
                        if waiting.is_none() {
                            state.waiting += 1;
                            waiting = Some(Waiting(&self.limits));
                        }
                        close_oldest_idle(&state, matches!(reason, LimitReached::PerAddress(_)).then_some(self.address));
                        reason
                    }
                }
            };
            // The connection that was asked to close may have begun a request meanwhile. Then ask another connection.
            let retry_at = (Instant::now() + CLOSE_RETRY_INTERVAL).min(deadline);
            if tokio::time::timeout_at(retry_at, freed).await.is_err() && Instant::now() >= deadline {
                return Err(reason);
            }
        }
    }
}

impl Drop for ConnectionPermit {
    fn drop(&mut self) {
        let mut state = self.limits.state();
        let decrement = |counts: &mut HashMap<IpAddr, usize>, address| {
            if let Some(count) = counts.get_mut(&address) {
                *count -= 1;
                if *count == 0 {
                    counts.remove(&address);
                }
            }
        };
        if state.admitted.remove(&self.id).is_some() {
            decrement(&mut state.addresses, self.address);
        }
        state.reserve.remove(&self.id);
        drop(state);
        self.limits.freed.notify_waiters();
    }
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt as _;

    use super::*;

    fn address(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    /// Makes the connection idle: one request begins and ends.
    fn make_idle(permit: &ConnectionPermit) {
        drop(permit.activity.begin_request());
    }

    #[tokio::test]
    async fn the_longest_idle_connection_is_closed_to_make_room() {
        let limits = Arc::new(ConnectionLimits::new(3, 0, Vec::new()));
        let register = |text| limits.register(address(text), Arc::new(ConnectionActivity::new()));
        let [busy, second, first] = [register("192.0.2.1"), register("192.0.2.2"), register("192.0.2.3")];
        let _busy = busy.activity.begin_request();
        for permit in [&first, &second] {
            make_idle(permit);
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        let waiter = register("192.0.2.4");
        assert!(waiter.in_reserve && limits.is_saturated());
        let waiting = tokio::spawn(async move { waiter.wait_until_admitted().await.map(|()| waiter) });
        first.close_requested().await;
        drop(first);
        let waiter = waiting.await.unwrap().expect("a permit is free");
        assert!(second.close_signal.notified().now_or_never().is_none(), "only one connection is asked to close");
        drop((busy, second, waiter));
        let state = limits.state();
        assert_eq!((state.admitted.len(), state.addresses.len(), state.reserve.len()), (0, 0, 0));
    }

    #[tokio::test]
    async fn an_address_has_a_connection_limit_but_trusted_proxies_have_none() {
        let limits =
            Arc::new(ConnectionLimits::new(100, 2, vec!["10.0.0.0/8".parse().unwrap(), "2001:db8:1::7/128".parse().unwrap()]));
        let register = |text| limits.register(address(text), Arc::new(ConnectionActivity::new()));
        let own = [register("192.0.2.1"), register("192.0.2.1")];
        let over = register("192.0.2.1");
        assert_eq!((over.in_reserve, over.wait_until_admitted().await), (true, Err(LimitReached::PerAddress(2))));
        assert!(!register("192.0.2.2").in_reserve);
        let proxy: Vec<ConnectionPermit> = (0..20).map(|_| register("10.1.2.3")).collect();
        assert!(proxy.iter().all(|permit| !permit.in_reserve));
        let proxy: Vec<ConnectionPermit> = (0..3).map(|_| register("2001:db8:1::7")).collect();
        assert!(proxy.iter().all(|permit| !permit.in_reserve), "a single trusted address of an untrusted network");
        // All IPv6 addresses of a /64 network share one limit.
        let nets = ["2001:db8::1", "2001:db8::2", "2001:db8::3"].map(register);
        assert_eq!(nets.each_ref().map(|permit| permit.in_reserve), [false, false, true]);
        drop(own);
        assert_eq!(over.wait_until_admitted().await, Ok(()));
    }

    #[tokio::test]
    async fn no_connection_is_closed_before_its_first_request_can_arrive() {
        let limits = Arc::new(ConnectionLimits::new(0, 0, Vec::new()));
        let begun = Instant::now();
        let reserved: Vec<ConnectionPermit> = (0..RESERVE_CONNECTIONS)
            .map(|_| limits.register(address("192.0.2.1"), Arc::new(ConnectionActivity::new())))
            .collect();
        reserved[0].close_requested().await;
        assert!(begun.elapsed() >= FIRST_REQUEST_GRACE, "{:?}", begun.elapsed());
    }

    #[tokio::test]
    async fn silent_connections_in_the_reserve_are_closed_for_new_ones() {
        let limits = Arc::new(ConnectionLimits::new(1, 0, Vec::new()));
        let register = || limits.register(address("192.0.2.1"), Arc::new(ConnectionActivity::new()));
        let first = register();
        let _busy = first.activity.begin_request();
        let reserved: Vec<ConnectionPermit> = (0..RESERVE_CONNECTIONS).map(|_| register()).collect();
        let asked = reserved.iter().filter(|permit| permit.close_signal.notified().now_or_never().is_some()).count();
        assert_eq!(asked, RESERVE_CONNECTIONS / 2, "the older half is asked to close");
        // Only a few requests may wait. The others are refused at once.
        let begun = Instant::now();
        let requests: Vec<_> = reserved.iter().map(|permit| permit.activity.begin_request()).collect();
        let outcomes = futures_util::future::join_all(
            reserved.iter().map(async |permit| (permit.wait_until_admitted().await, begun.elapsed())),
        )
        .await;
        assert!(outcomes.iter().all(|(outcome, _)| *outcome == Err(LimitReached::Total)));
        assert_eq!(outcomes.iter().filter(|(_, took)| *took >= ADMISSION_TIMEOUT).count(), MAX_WAITING);
        assert_eq!(limits.state().waiting, 0);
        drop(requests);
    }
}
