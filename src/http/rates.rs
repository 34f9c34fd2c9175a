//! Rates: how often a tenant may ask, and how often an address may come with a token that is not valid.
//!
//! Each replica counts for itself, in memory that is bounded.

use std::hash::Hash;
use std::net::{IpAddr, Ipv6Addr};
use std::num::NonZeroU32;
use std::sync::atomic::{AtomicU32, Ordering};

use governor::clock::{Clock as _, DefaultClock};
use governor::{DefaultKeyedRateLimiter, Quota, RateLimiter};

/// Most keys that are counted apart; those beyond share one count. A key has about 100 bytes.
const KEYS: usize = 100_000;
/// How many requests pass between two looks for keys that may be forgotten.
const ROUND: u32 = 1024;

/// The counts of one replica.
pub(super) struct Rates {
    tenants: Option<Gate<String>>,
    logins: Option<Gate<IpAddr>>,
}

impl Rates {
    /// None where a rate is zero.
    pub(super) fn new(tenant_requests_per_second: u32, failed_logins_per_minute: u32) -> Self {
        let rate = NonZeroU32::new;
        Self {
            tenants: rate(tenant_requests_per_second).map(|rate| Gate::new(Quota::per_second(rate), String::new())),
            logins: rate(failed_logins_per_minute)
                .map(|rate| Gate::new(Quota::per_minute(rate), IpAddr::V6(Ipv6Addr::UNSPECIFIED))),
        }
    }

    /// Counts a tenant's request; an error is how many seconds to wait.
    pub(super) fn request(&self, tenant: &str) -> Result<(), u64> {
        self.tenants.as_ref().map_or(Ok(()), |gate| gate.pass(&tenant.to_owned()))
    }

    /// Counts a failed login; an error is how many seconds to wait.
    pub(super) fn failed_login(&self, address: IpAddr) -> Result<(), u64> {
        self.logins.as_ref().map_or(Ok(()), |gate| gate.pass(&holder(address)))
    }
}

/// Whoever holds an IPv6 address holds its whole /64.
pub(super) fn holder(address: IpAddr) -> IpAddr {
    match address {
        IpAddr::V4(_) => address,
        IpAddr::V6(address) => IpAddr::V6(Ipv6Addr::from_bits(address.to_bits() & !u128::from(u64::MAX))),
    }
}

struct Gate<K: Hash + Eq + Clone> {
    limiter: DefaultKeyedRateLimiter<K>,
    /// The key of those that are not counted apart.
    rest: K,
    passed: AtomicU32,
}

impl<K: Hash + Eq + Clone> Gate<K> {
    fn new(quota: Quota, rest: K) -> Self {
        Self { limiter: RateLimiter::keyed(quota), rest, passed: AtomicU32::new(0) }
    }

    fn pass(&self, key: &K) -> Result<(), u64> {
        if self.passed.fetch_add(1, Ordering::Relaxed).is_multiple_of(ROUND) {
            self.limiter.retain_recent();
        }
        let key = if self.limiter.len() < KEYS { key } else { &self.rest };
        self.limiter.check_key(key).map_err(|until| {
            let wait = until.wait_time_from(DefaultClock::default().now());
            wait.as_secs() + u64::from(wait.subsec_nanos() > 0)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_key_has_its_own_count_and_zero_counts_nothing() {
        let rates = Rates::new(3, 60);
        let passed = |tenant: &str| (0..10).filter(|_| rates.request(tenant).is_ok()).count();
        assert_eq!(passed("a"), 3);
        assert_eq!(passed("b"), 3);
        assert_eq!(rates.request("a"), Err(1));
        let address = |text: &str| text.parse::<IpAddr>().unwrap();
        for n in 0..60 {
            rates.failed_login(address(&format!("2001:db8::{n:x}"))).unwrap();
        }
        assert_eq!(rates.failed_login(address("2001:db8::ffff")), Err(1));
        rates.failed_login(address("2001:db8:0:1::1")).unwrap();
        let none = Rates::new(0, 0);
        assert!((0..5000).all(|_| none.request("a").is_ok() && none.failed_login(address("192.0.2.1")).is_ok()));
    }

    #[test]
    fn a_flood_of_addresses_fills_no_memory() {
        let rates = Rates::new(1, 60);
        for n in 0..(KEYS as u32 + 5000) {
            let _ = rates.failed_login(IpAddr::V4(n.into()));
        }
        let gate = rates.logins.as_ref().unwrap();
        assert!(gate.limiter.len() <= KEYS + 1, "{}", gate.limiter.len());
    }
}
