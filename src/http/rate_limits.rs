//! Rate limits: requests of each tenant, and invalid tokens from each client address.
//!
//! Each replica counts on its own. The memory for the counters is bounded.

use std::hash::Hash;
use std::net::{IpAddr, Ipv6Addr};
use std::num::NonZeroU32;
use std::sync::atomic::{AtomicU32, Ordering};

use governor::clock::{Clock as _, DefaultClock};
use governor::{DefaultKeyedRateLimiter, Quota, RateLimiter};

/// The largest number of keys with their own counter; further keys share one. A key takes about 100 bytes.
const MAX_KEYS: usize = 100_000;
/// How many checks pass between two cleanups of unused keys.
const CHECKS_PER_CLEANUP: u32 = 1024;

/// The rate limits of one replica.
pub(super) struct RateLimits {
    tenants: Option<KeyedLimiter<String>>,
    logins: Option<KeyedLimiter<IpAddr>>,
}

impl RateLimits {
    /// A rate of 0 means no limit.
    pub(super) fn new(tenant_requests_per_second: u32, failed_logins_per_minute: u32) -> Self {
        let rate = NonZeroU32::new;
        Self {
            tenants: rate(tenant_requests_per_second).map(|rate| KeyedLimiter::new(Quota::per_second(rate), String::new())),
            logins: rate(failed_logins_per_minute)
                .map(|rate| KeyedLimiter::new(Quota::per_minute(rate), IpAddr::V6(Ipv6Addr::UNSPECIFIED))),
        }
    }

    /// Counts a tenant's request. The error is how many seconds the client should wait.
    pub(super) fn request(&self, tenant: &str) -> Result<(), u64> {
        self.tenants.as_ref().map_or(Ok(()), |limiter| limiter.check(&tenant.to_owned()))
    }

    /// Counts an invalid token. The error is how many seconds the client should wait.
    pub(super) fn failed_login(&self, address: IpAddr) -> Result<(), u64> {
        self.logins.as_ref().map_or(Ok(()), |limiter| limiter.check(&network_of(address)))
    }
}

/// The network that is counted as one client: an IPv4 address, or the /64 network of an IPv6 address.
pub(super) fn network_of(address: IpAddr) -> IpAddr {
    match address {
        IpAddr::V4(_) => address,
        IpAddr::V6(address) => IpAddr::V6(Ipv6Addr::from_bits(address.to_bits() & !u128::from(u64::MAX))),
    }
}

struct KeyedLimiter<K: Hash + Eq + Clone> {
    limiter: DefaultKeyedRateLimiter<K>,
    /// The shared key for keys beyond [`MAX_KEYS`].
    overflow_key: K,
    /// The number of checks since the start.
    checks: AtomicU32,
}

impl<K: Hash + Eq + Clone> KeyedLimiter<K> {
    fn new(quota: Quota, overflow_key: K) -> Self {
        Self { limiter: RateLimiter::keyed(quota), overflow_key, checks: AtomicU32::new(0) }
    }

    fn check(&self, key: &K) -> Result<(), u64> {
        if self.checks.fetch_add(1, Ordering::Relaxed).is_multiple_of(CHECKS_PER_CLEANUP) {
            self.limiter.retain_recent();
        }
        let key = if self.limiter.len() < MAX_KEYS { key } else { &self.overflow_key };
        self.limiter.check_key(key).map_err(|not_until| {
            let wait = not_until.wait_time_from(DefaultClock::default().now());
            wait.as_secs() + u64::from(wait.subsec_nanos() > 0)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_key_has_its_own_limit_and_zero_means_no_limit() {
        let limits = RateLimits::new(3, 60);
        let allowed = |tenant: &str| (0..10).filter(|_| limits.request(tenant).is_ok()).count();
        assert_eq!(allowed("a"), 3);
        assert_eq!(allowed("b"), 3);
        assert_eq!(limits.request("a"), Err(1));
        let address = |text: &str| text.parse::<IpAddr>().unwrap();
        for n in 0..60 {
            limits.failed_login(address(&format!("2001:db8::{n:x}"))).unwrap();
        }
        assert_eq!(limits.failed_login(address("2001:db8::ffff")), Err(1));
        limits.failed_login(address("2001:db8:0:1::1")).unwrap();
        let unlimited = RateLimits::new(0, 0);
        assert!((0..5000).all(|_| unlimited.request("a").is_ok() && unlimited.failed_login(address("192.0.2.1")).is_ok()));
    }

    #[test]
    fn many_addresses_do_not_grow_memory_without_bound() {
        let limits = RateLimits::new(1, 60);
        for n in 0..(MAX_KEYS as u32 + 5000) {
            let _ = limits.failed_login(IpAddr::V4(n.into()));
        }
        let limiter = limits.logins.as_ref().unwrap();
        assert!(limiter.limiter.len() <= MAX_KEYS + 1, "{}", limiter.limiter.len());
    }
}
