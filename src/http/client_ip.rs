//! The client's IP address: the address of the TCP peer, or the address that a trusted proxy reports.

use std::net::{IpAddr, SocketAddr};

use axum::http::HeaderMap;
use ipnet::IpNet;

/// The only header that is read. `Forwarded` (RFC 7239) is not supported.
const X_FORWARDED_FOR: &str = "x-forwarded-for";

/// The IP address of the TCP peer.
#[derive(Debug, Clone, Copy)]
pub(super) struct PeerIp(pub(super) IpAddr);

/// The IP address that a request came from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct ClientIp(pub(super) IpAddr);

/// The right-most address that is not a trusted proxy's. Each proxy appends the address of its peer. So an entry to the left of
/// an untrusted address is that client's claim, and is ignored. An entry that is not an address ends the search.
pub(super) fn client_ip(peer: IpAddr, headers: &HeaderMap, trusted: &[IpNet]) -> ClientIp {
    let is_trusted = |address: &IpAddr| trusted.iter().any(|net| net.contains(address));
    let mut client = peer.to_canonical();
    let values: Vec<&str> = headers.get_all(X_FORWARDED_FOR).iter().map(|value| value.to_str().unwrap_or("?")).collect();
    for hop in values.iter().rev().flat_map(|value| value.rsplit(',')) {
        if !is_trusted(&client) {
            break;
        }
        let Some(previous) = parse(hop.trim()) else { break };
        client = previous;
    }
    ClientIp(client)
}

/// Parses an address with or without a port.
fn parse(hop: &str) -> Option<IpAddr> {
    let bare = hop.strip_prefix('[').and_then(|hop| hop.strip_suffix(']')).unwrap_or(hop);
    let address = bare.parse().ok().or_else(|| hop.parse().ok().map(|socket: SocketAddr| socket.ip()));
    address.map(|address: IpAddr| address.to_canonical())
}

#[cfg(test)]
mod tests {
    use super::*;
    use axum::http::HeaderValue;
    use proptest::prelude::*;

    fn client(peer: &str, forwarded: &[&str], trusted: &[&str]) -> String {
        let mut headers = HeaderMap::new();
        for value in forwarded {
            headers.append(X_FORWARDED_FOR, HeaderValue::from_bytes(value.as_bytes()).unwrap());
        }
        let trusted: Vec<IpNet> = trusted.iter().map(|net| net.parse().unwrap()).collect();
        client_ip(peer.parse().unwrap(), &headers, &trusted).0.to_string()
    }

    #[test]
    fn only_trusted_proxies_can_set_the_client_address() {
        let nets = ["10.0.0.0/8", "2001:db8::/32"];
        for (peer, forwarded, expected) in [
            ("192.0.2.1", vec![], "192.0.2.1"),
            ("192.0.2.1", vec!["198.51.100.7"], "192.0.2.1"),
            ("10.0.0.1", vec![], "10.0.0.1"),
            ("10.0.0.1", vec!["198.51.100.7"], "198.51.100.7"),
            ("::ffff:10.0.0.1", vec!["198.51.100.7"], "198.51.100.7"),
            ("10.0.0.1", vec!["6.6.6.6, 198.51.100.7"], "198.51.100.7"),
            ("10.0.0.1", vec!["6.6.6.6", "198.51.100.7"], "198.51.100.7"),
            ("10.0.0.1", vec!["198.51.100.7, 10.0.0.2,10.0.0.3"], "198.51.100.7"),
            ("10.0.0.1", vec!["198.51.100.7", "10.0.0.2"], "198.51.100.7"),
            ("10.0.0.1", vec!["10.0.0.3, 10.0.0.2"], "10.0.0.3"),
            ("10.0.0.1", vec!["198.51.100.7:4711"], "198.51.100.7"),
            ("2001:db8::1", vec!["[2a00::1]:443"], "2a00::1"),
            ("2001:db8::1", vec!["[2a00::1]"], "2a00::1"),
            ("10.0.0.1", vec!["6.6.6.6, unknown"], "10.0.0.1"),
            ("10.0.0.1", vec!["6.6.6.6, _hidden, 10.0.0.2"], "10.0.0.2"),
            ("10.0.0.1", vec![""], "10.0.0.1"),
            ("10.0.0.1", vec!["6.6.6.6,"], "10.0.0.1"),
            ("10.0.0.1", vec!["\u{e9}"], "10.0.0.1"),
        ] {
            assert_eq!(client(peer, &forwarded, &nets), expected, "{peer} {forwarded:?}");
        }
        assert_eq!(client("10.0.0.1", &["198.51.100.7"], &[]), "10.0.0.1");
    }

    proptest! {
        /// A client may send any header. Its address is the entry that the trusted proxy appends.
        #[test]
        fn a_client_cannot_choose_its_address(forged in "[ -~]{0,80}") {
            prop_assert_eq!(client("10.0.0.1", &[&format!("{forged}, 198.51.100.7")], &["10.0.0.0/8"]), "198.51.100.7");
            prop_assert_eq!(client("10.0.0.1", &[&forged, "198.51.100.7"], &["10.0.0.0/8"]), "198.51.100.7");
        }
    }
}
