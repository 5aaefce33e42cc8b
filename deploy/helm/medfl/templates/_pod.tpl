{{- define "medfl.podSecurity" }}
      automountServiceAccountToken: false
      enableServiceLinks: false
      terminationGracePeriodSeconds: 60
      securityContext:
        runAsNonRoot: true
        runAsUser: 10001
        runAsGroup: 10001
        fsGroup: 10001
        # Not Always: it would open the files to the group, and medfl refuses keys that others can read.
        fsGroupChangePolicy: OnRootMismatch
        seccompProfile: { type: RuntimeDefault }
{{- end -}}
{{- define "medfl.containerSecurity" }}
          securityContext:
            allowPrivilegeEscalation: false
            readOnlyRootFilesystem: true
            capabilities: { drop: [ALL] }
{{- end -}}
{{- define "medfl.state" }}
  volumeClaimTemplates:
    - metadata: { name: state }
      spec:
        accessModes: [ReadWriteOnce]
        {{- if .Values.storage.class }}
        storageClassName: {{ .Values.storage.class | quote }}
        {{- end }}
        resources: { requests: { storage: {{ .Values.storage.size }} } }
{{- end -}}
