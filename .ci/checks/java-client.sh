#!/usr/bin/env bash
# The Java serializer and deserializers under clients/java: their tests, against a real Kafka and a broker that uses it.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
. .ci/dev.sh
. .ci/neighbours.sh

bash .ci/tools.sh kafka
kafka=${LFS_TEST_KAFKA:-}
if [ -z "$kafka" ]; then
    NEIGHBOURS=$WORK/neighbours
    mkdir "$NEIGHBOURS"
    extra_cleanup=stop_all
    start_kafka
    kafka=$LFS_TEST_KAFKA
fi
dev_options=(--kafka "$kafka")
start_dev
# In a copy, so that nothing of another build counts and nothing is left in the tree.
cp -r clients/java "$WORK/java"
rm -rf "$WORK/java/target"
mvn -q -B -f "$WORK/java/pom.xml" verify
ran=$(awk -F'[ ,]+' '/^Tests run:.* Failures: 0, Errors: 0, Skipped: 0,/ { n += $3 } END { print n + 0 }' "$WORK"/java/target/surefire-reports/*.txt)
[ "$ran" -ge 70 ] || { echo "only $ran tests ran"; exit 1; }

# The example, as an application has it: the module's jar among Kafka's own.
mvn -q -B -f "$WORK/java/pom.xml" dependency:build-classpath -DincludeScope=compile -Dmdep.outputFile="$WORK/classpath"
classpath=$(echo "$WORK"/java/target/lfs-broker-kafka-*.jar):$(<"$WORK/classpath")
topic=java-example-$RANDOM$RANDOM
topics() {
    local name
    for name in "$topic" "$topic.lfs-staging"; do
        java -cp "$KAFKA_HOME/*" org.apache.kafka.tools.TopicCommand --bootstrap-server "$kafka" "$@" --topic "$name"
    done
}
topics --create --partitions 1
java -Xmx1g -cp "$classpath" examples/java/LargeValues.java "$topic"
topics --delete
echo "Java client: the example and $ran tests passed against Kafka at $kafka and a running broker"
