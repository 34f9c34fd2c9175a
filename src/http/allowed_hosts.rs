//! The hosts and origins that a broker without tokens accepts: loopback, and the configured hosts and origins.
//!
//! Such a broker listens on loopback only, but web pages can still reach it by DNS rebinding. An attacker's name resolves to
//! 127.0.0.1, so the browser treats the responses as the attacker's own. The request's `Host` and `Origin` reveal this.

use std::net::IpAddr;

use axum::http::request::Parts;
use axum::http::uri::Authority;
use axum::http::{HeaderMap, header};

/// The allowed hosts and origins besides loopback.
#[derive(Debug, Clone, Default)]
pub struct AllowedHosts {
    /// Other host names of the broker: the host of `LFS_BROKER_PUBLIC_URL`.
    pub hosts: Vec<String>,
    /// `LFS_BROKER_CORS_ORIGINS`: other origins whose pages may call the API.
    pub origins: Vec<String>,
}

impl AllowedHosts {
    /// Whether the request's host and origin are both allowed.
    pub(super) fn allows(&self, request: &Parts) -> bool {
        let hosts = request.headers.get_all(header::HOST).iter().map(|host| host.to_str().unwrap_or("?"));
        let mut hosts = hosts.chain(request.uri.authority().map(Authority::as_str));
        hosts.all(|host| is_loopback(host) || self.is_allowed_host(host)) && self.is_allowed_origin(&request.headers)
    }

    fn is_allowed_host(&self, authority: &str) -> bool {
        host_name(authority).is_some_and(|found| self.hosts.iter().any(|host| host.eq_ignore_ascii_case(found)))
    }

    fn is_allowed_origin(&self, headers: &HeaderMap) -> bool {
        headers.get_all(header::ORIGIN).iter().all(|origin| {
            let origin = origin.to_str().unwrap_or("?");
            let authority = origin.split_once("://").map(|(_, authority)| authority);
            self.origins.iter().any(|allowed| allowed == "*" || allowed == origin)
                || authority.is_some_and(|authority| is_loopback(authority) || self.is_allowed_host(authority))
        })
    }
}

/// Whether the host of `name:port` is a loopback address, `localhost`, or a name below it, which resolves to it (RFC 6761).
fn is_loopback(authority: &str) -> bool {
    let Some(host) = host_name(authority) else { return false };
    let host = host.trim_end_matches('.').to_ascii_lowercase();
    match host.trim_matches(['[', ']']).parse::<IpAddr>() {
        Ok(address) => address.to_canonical().is_loopback(),
        Err(_) => host == "localhost" || host.ends_with(".localhost"),
    }
}

/// The host name of an authority, without the port.
fn host_name(authority: &str) -> Option<&str> {
    let (host, port) = match authority.rfind(':') {
        Some(colon) if !authority.ends_with(']') => (&authority[..colon], &authority[colon + 1..]),
        _ => (authority, ""),
    };
    (!host.is_empty() && port.bytes().all(|byte| byte.is_ascii_digit())).then_some(host)
}

#[cfg(test)]
mod tests {
    use super::*;
    use axum::http::Request;
    use proptest::prelude::*;

    fn allows(local: &AllowedHosts, host: &str, origin: Option<&str>) -> bool {
        let mut request = Request::get("/").header("host", host);
        if let Some(origin) = origin {
            request = request.header("origin", origin);
        }
        local.allows(&request.body(()).unwrap().into_parts().0)
    }

    #[test]
    fn only_loopback_and_configured_hosts_and_origins_are_allowed() {
        let none = AllowedHosts::default();
        for host in
            ["localhost", "LOCALHOST:8080", "127.0.0.1:8080", "127.9.9.9", "[::1]:80", "[::1]", "a.localhost:1", "localhost."]
        {
            assert!(allows(&none, host, None), "{host}");
        }
        for host in [
            "evil.example",
            "evil.example:8080",
            "0.0.0.0:8080",
            "10.0.0.1",
            "127.0.0.1.evil.example",
            "localhost.evil",
            "",
            "127.0.0.1:80@evil.example",
            "[::2]",
            "localhost:8080:9",
            "xlocalhost",
            "8080",
            ":8080",
        ] {
            assert!(!allows(&none, host, None), "{host}");
        }
        for (origin, wanted) in [
            ("http://localhost:3000", true),
            ("http://127.0.0.1:8080", true),
            ("http://[::1]", true),
            ("https://evil.example", false),
            ("null", false),
            ("http://localhost.evil", false),
            ("", false),
        ] {
            assert_eq!(allows(&none, "localhost", Some(origin)), wanted, "{origin}");
        }
        let some = AllowedHosts { hosts: vec!["lfs.example".to_owned()], origins: vec!["https://app.example".to_owned()] };
        assert!(
            allows(&some, "LFS.example:443", Some("https://app.example"))
                && allows(&some, "lfs.example", Some("https://lfs.example"))
        );
        assert!(!allows(&some, "lfs.example", Some("https://evil.example")) && !allows(&some, "app.example", None));
        let any = AllowedHosts { origins: vec!["*".to_owned()], ..AllowedHosts::default() };
        assert!(allows(&any, "localhost", Some("null")) && !allows(&any, "evil.example", None));
    }

    proptest! {
        #[test]
        fn no_host_causes_a_panic(host in "\\PC{0,40}") {
            let _ = is_loopback(&host);
        }
    }
}
