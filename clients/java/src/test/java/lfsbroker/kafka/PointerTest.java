package lfsbroker.kafka;

import static org.junit.jupiter.api.Assertions.assertEquals;
import static org.junit.jupiter.api.Assertions.assertFalse;
import static org.junit.jupiter.api.Assertions.assertThrows;
import static org.junit.jupiter.api.Assertions.assertTrue;

import java.nio.charset.StandardCharsets;
import org.junit.jupiter.api.Test;
import org.junit.jupiter.params.ParameterizedTest;
import org.junit.jupiter.params.provider.CsvSource;
import org.junit.jupiter.params.provider.ValueSource;

class PointerTest {
    private static final String SHA256 = "2cf24dba5fb0a30e26e83b2ac5b9e29e1b161e5c1fa7425e73043362938b9824";

    private static byte[] bytes(String text) {
        return text.getBytes(StandardCharsets.UTF_8);
    }

    @Test
    void anEnvelopeOfKafScaleIsParsed() {
        byte[] json = bytes("{\"kfs_lfs\":1,\"bucket\":\"b\",\"key\":\"k\",\"size\":5,\"sha256\":\"" + SHA256.toUpperCase()
                + "\",\"original_headers\":{},\"proxy_id\":\"p\"}");
        assertTrue(Pointer.looksLike(json));
        Pointer pointer = Pointer.parse(json);
        assertEquals("b", pointer.bucket());
        assertEquals("k", pointer.key());
        assertEquals(5, pointer.size());
        assertEquals(new Checksum("sha256", SHA256), pointer.checksum());
    }

    @ParameterizedTest
    @ValueSource(strings = {"", "hello", "{}", "[\"kfs_lfs\"]", " {\"kfs_lfs\":1}", "{\"a\":\"01234567890123456789012345678901234567890123\",\"kfs_lfs\":1}"})
    void dataDoesNotLookLikeAPointer(String value) {
        assertFalse(Pointer.looksLike(bytes(value)));
    }

    @ParameterizedTest
    @ValueSource(strings = {
        "{\"kfs_lfs\":1",
        "{\"kfs_lfs\":1} x",
        "{\"kfs_lfs\":2,\"bucket\":\"b\",\"key\":\"k\",\"size\":5}",
        "{\"kfs_lfs\":4294967297,\"bucket\":\"b\",\"key\":\"k\",\"size\":5}",
        "{\"kfs_lfs\":\"1\",\"bucket\":\"b\",\"key\":\"k\",\"size\":5}",
        "{\"kfs_lfs\":1.5,\"bucket\":\"b\",\"key\":\"k\",\"size\":5}",
        "{\"kfs_lfs\":true,\"bucket\":\"b\",\"key\":\"k\",\"size\":5}",
        "{\"kfs_lfs\":1,\"key\":\"k\",\"size\":5}",
        "{\"kfs_lfs\":1,\"bucket\":\"b\",\"key\":\"\",\"size\":5}",
        "{\"kfs_lfs\":1,\"bucket\":\"b\",\"key\":7,\"size\":5}",
        "{\"kfs_lfs\":1,\"bucket\":\"b\",\"key\":\"k\"}",
        "{\"kfs_lfs\":1,\"bucket\":\"b\",\"key\":\"k\",\"size\":-1}",
        "{\"kfs_lfs\":1,\"bucket\":\"b\",\"key\":\"k\",\"size\":1.5}",
        "{\"kfs_lfs\":1,\"bucket\":\"b\",\"key\":\"k\",\"size\":5,\"sha256\":\"abc\"}",
        "{\"kfs_lfs\":1,\"bucket\":\"b\",\"key\":\"k\",\"size\":5,\"sha256\":7}",
        "{\"kfs_lfs\":1,\"bucket\":\"b\",\"key\":\"k\",\"size\":5,\"sha256\":{}}",
        "{\"kfs_lfs\":1,\"bucket\":\"b\",\"key\":\"k\",\"size\":5,\"checksum\":[\"00\"]}",
        "{\"kfs_lfs\":1,\"bucket\":\"b\",\"key\":\"k\",\"size\":5,\"checksum_alg\":\"rot13\",\"checksum\":\"00\"}",
        "{\"kfs_lfs\":1,\"bucket\":\"b\",\"key\":\"k\",\"size\":5,\"checksum_alg\":\"md5\"}",
    })
    void anInvalidPointerIsAnError(String value) {
        assertTrue(Pointer.looksLike(bytes(value)));
        assertThrows(LfsException.Malformed.class, () -> Pointer.parse(bytes(value)));
    }

    /** The published check values of these algorithms for "123456789". */
    @ParameterizedTest
    @CsvSource({
        "crc32,cbf43926",
        "crc32c,e3069283",
        "crc64nvme,ae8b14860a799888",
        "md5,25f9e794323b453885f5181f1b624d0b",
        "sha256,15e2b0d3c33891ebb0f1ef609ec419420c20e320ce94c65fbc8c3312448eb225",
    })
    void everyChecksumAlgorithmGivesItsPublishedCheckValue(String algorithm, String hex) {
        Checksum.Hasher hasher = Checksum.of(null, algorithm, hex).hasher();
        hasher.update(bytes("x123456789x"), 1, 9);
        assertEquals(hex, hasher.hex());
    }
}
